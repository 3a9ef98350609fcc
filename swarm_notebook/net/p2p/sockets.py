"""Sockets to the network daemon that are closed in their loop, whoever drops them, and read out.

asyncio's `StreamWriter` closes a socket that was dropped when it is freed, and that may be in any
thread: the garbage collector's. On uvloop libuv may be reading from the socket just then; what it
would call has become null, and the process dies of a segmentation fault in ``uv__read``. hivemind
drops sockets whenever the daemon refuses something, in the frames of the exception.

asyncio's `StreamReader` forgets what has come when a socket breaks. What a peer says last, though,
is why it ends the stream, and a break follows at once: so it is read before the end is met.
"""

from __future__ import annotations

import asyncio

from hivemind.p2p import P2P


class LoopWriter(asyncio.StreamWriter):
    """A writer whose loop closes it, also when it is freed in another thread."""

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        protocol: asyncio.BaseProtocol,
        reader: asyncio.StreamReader,
        loop: asyncio.AbstractEventLoop,
    ):
        super().__init__(transport, protocol, reader, loop)
        self._home = loop

    def __del__(self) -> None:
        # What is called later holds the transport, and so keeps it until then.
        if not self.is_closing():
            # While the interpreter ends, names of modules are gone: so nothing global is needed.
            try:  # noqa: SIM105
                self._home.call_soon_threadsafe(self.transport.abort)
            except RuntimeError:  # the loop has ended, and reads no more
                pass


class LastWordReader(asyncio.StreamReader):
    """A reader in which what came before a socket broke can still be read; then the file ends."""

    def set_exception(self, exc: Exception) -> None:
        if isinstance(exc, ConnectionError):
            self.feed_eof()
        else:
            super().set_exception(exc)


async def open_unix_connection(path: str) -> tuple[LastWordReader, LoopWriter]:
    """As asyncio's; with a `LastWordReader` and a `LoopWriter`."""
    loop = asyncio.get_running_loop()
    reader = LastWordReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.create_unix_connection(lambda: protocol, path)
    return reader, LoopWriter(transport, protocol, reader, loop)


def use_loop_writers(p2p: P2P) -> None:
    """Let hivemind open its sockets to the daemon in this way."""
    connector = p2p._client.control.daemon_connector
    path = connector.control_maddr.value_for_protocol("unix")
    connector.open_connection = lambda: open_unix_connection(path)
