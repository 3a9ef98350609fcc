"""When a server process ends, and that nothing of it stays behind.

The process is told to leave by SIGTERM, by SIGINT, or (as a child of a notebook) by the end of
its standard input, which comes even if the parent is killed. p2pd, its child, ends by itself
within seconds when the connection to this process breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

from hivemind.p2p import P2P

from swarm_notebook.net.loop import PeerLoop


def leaving(exit_with_stdin: bool) -> asyncio.Event:
    """An event that is set when the process is told to leave; for the running loop."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    if exit_with_stdin:
        threading.Thread(target=_await_end_of_stdin, args=(loop, event), daemon=True).start()
    return event


def _await_end_of_stdin(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    with contextlib.suppress(RuntimeError):  # the loop has ended already
        loop.call_soon_threadsafe(event.set)


def server_loop() -> PeerLoop:
    """The loop of a server's process.

    A server that leads its own session (a notebook starts it so) has no terminal; its children stay
    in its group, so that all can be ended at once.
    """
    return PeerLoop(detached=os.getsid(0) != os.getpid())


async def daemon_ended(p2p: P2P) -> None:
    """Return when the p2pd process of this peer has ended."""
    if p2p._child is not None:
        await p2p._child.wait()


def daemon_lives(p2p: P2P) -> bool:
    return p2p._child is not None and p2p._child.returncode is None


async def clear_up(p2p: P2P) -> None:
    """Take away what is left of a peer whose p2pd has ended by itself: tasks and sockets."""
    await p2p.shutdown()
    _remove(p2p._daemon_listen_maddr["unix"])


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()
