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
from typing import Any

import uvloop
from hivemind.p2p import P2P


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


class ServerLoop(uvloop.Loop):
    """A fast loop whose child processes a Ctrl-C in the terminal does not reach.

    The terminal interrupts its whole process group, and p2pd would end before the steps in flight
    are answered. A server that leads its own session (a notebook starts it so) has no terminal;
    its children stay in its group, so that all can be ended at once.
    """

    async def subprocess_exec(self, *arguments: Any, **options: Any) -> Any:
        apart = os.getsid(0) != os.getpid()
        return await super().subprocess_exec(*arguments, start_new_session=apart, **options)


async def daemon_ended(p2p: P2P) -> None:
    """Return when the p2pd process of this peer has ended."""
    if p2p._child is not None:
        await p2p._child.wait()


def daemon_lives(p2p: P2P) -> bool:
    return p2p._child is not None and p2p._child.returncode is None
