"""Sockets to the network daemon that are closed in their loop, whoever drops them.

asyncio's `StreamWriter` closes a socket that was dropped when it is freed, and that may be in any
thread: the garbage collector's. On uvloop libuv may be reading from the socket just then; what it
would call has become null, and the process dies of a segmentation fault in ``uv__read``. hivemind
drops sockets whenever the daemon refuses something, in the frames of the exception.
"""

from __future__ import annotations

import asyncio
import contextlib

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
            with contextlib.suppress(RuntimeError):  # the loop has ended, and reads no more
                self._home.call_soon_threadsafe(self.transport.abort)


async def open_unix_connection(path: str) -> tuple[asyncio.StreamReader, LoopWriter]:
    """As asyncio's; with a `LoopWriter`."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.create_unix_connection(lambda: protocol, path)
    return reader, LoopWriter(transport, protocol, reader, loop)


def use_loop_writers(p2p: P2P) -> None:
    """Let hivemind open its sockets to the daemon in this way."""
    connector = p2p._client.control.daemon_connector
    path = connector.control_maddr.value_for_protocol("unix")
    connector.open_connection = lambda: open_unix_connection(path)
