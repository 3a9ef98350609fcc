"""p2pd, the process that speaks libp2p for one peer: whether it lives, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from hivemind.p2p import P2P

logger: logging.Logger = logging.getLogger(__name__)

# p2pd ends within 0.1 s of SIGTERM (measured); a busy machine may take much longer.
STOP_SECONDS = 5.0
EXIT_POLL_SECONDS = 0.01
# A loop that gets SIGCHLD reaps its child within milliseconds.
REAP_SECONDS = 0.5


def end_if_unheard(p2p: P2P) -> None:
    """From now on, a daemon ends that this process does not hear or read any more.

    hivemind's tasks for that do not come back: what runs out of memory, or of a socket, leaves a
    peer that is there for ever and answers nobody. A daemon that has died is noticed.
    """

    def unheard(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        why = task.exception() or "the connection to it has broken"
        if lives(p2p) and p2p._child is not None:
            logger.error("the network daemon is not heard any more, so it ends: %r", why)
            with contextlib.suppress(ProcessLookupError):
                p2p._child.terminate()

    control = p2p._client.control
    for task in (control._read_task, control._write_task, p2p._reader_task):
        task.add_done_callback(unheard)


async def ended(p2p: P2P) -> None:
    """Return when the p2pd process of this peer has ended."""
    if p2p._child is not None:
        await p2p._child.wait()


def lives(p2p: P2P) -> bool:
    return p2p._child is not None and p2p._child.returncode is None


async def clear_up(p2p: P2P) -> None:
    """Take away what is left of a peer whose p2pd has ended by itself: tasks and sockets."""
    await p2p.shutdown()
    _remove(p2p._daemon_listen_maddr["unix"])


def _remove(socket: str) -> None:
    Path(socket).unlink(missing_ok=True)


async def end(p2p: P2P) -> None:
    """End the p2pd of this peer, and wait until it has."""
    # Not `P2P.shutdown`: it waits for SIGCHLD, which others may have taken (torch's DataLoader
    # does), and then for ever.
    p2p._terminate()
    if p2p._child is None:
        return
    pid = p2p._child.pid
    if not await _within(STOP_SECONDS, lambda: _has_exited(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        await _within(STOP_SECONDS, lambda: _has_exited(pid))
    # Usually its loop sees to what is left of it.
    if not await _within(REAP_SECONDS, lambda: not _is_left(pid)):
        _reap(pid)


async def _within(seconds: float, done: Callable[[], bool]) -> bool:
    """Wait for something that happens without a word; whether it did."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(EXIT_POLL_SECONDS)
    return True


def _has_exited(pid: int) -> bool:
    return not psutil.pid_exists(pid) or _is_left(pid)


def _is_left(pid: int) -> bool:
    """Whether a child has exited and is still to be waited for."""
    # Not `os.waitid`, which Python has on macOS since 3.13 only.
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
