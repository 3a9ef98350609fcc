"""When a server process ends, and that nothing of it stays behind.

The process is told to leave by SIGTERM, by SIGINT, or (as a child of a notebook) by the end of
its standard input, which comes even if the parent is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


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


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Processes started in this context ignore SIGINT, and so does this one meanwhile."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
