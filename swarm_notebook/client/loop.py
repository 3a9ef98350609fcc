"""The one background thread, with one asyncio loop, that does all networking of this process.

The user's thread hands it coroutines and waits. An interrupt of the kernel is raised in the
waiting thread at once, and cancels the coroutine, which closes its streams and so ends the work
on the servers (contract C5).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from swarm_notebook.errors import ConnectionFailed
from swarm_notebook.net.p2p.loop import PeerLoop

T = TypeVar("T")
Cleanup = Callable[[], Coroutine[Any, Any, None]]

# Leaving the DHT and ending p2pd take well under a second; a kernel must not hang at its end.
_STOP_TIMEOUT = 5.0


class LoopThread:
    """A daemon thread that runs an asyncio loop for as long as the process lives."""

    def __init__(self) -> None:
        self.loop: PeerLoop = PeerLoop(detached=True)
        self._process = os.getpid()
        self._thread = threading.Thread(
            target=self._main, name="swarm_notebook-network", daemon=True
        )
        self._waiting: dict[int, Future] = {}  # what each of the other threads waits for
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it; interrupting the wait cancels it.

        Raises:
            ConnectionFailed: this process was forked off the one whose network thread this is.
        """
        if self.forked:
            work.close()
            raise ConnectionFailed(
                f"this process ({os.getpid()}) was forked off a notebook ({self._process}) that is "
                "attached to a swarm, and cannot use its connection; call swarm_notebook.connect "
                "in a spawned process, or compute in the notebook"
            )
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("LoopThread.run called from the loop itself would wait forever")
        outcome: Future[T] = Future()
        thread = threading.get_ident()
        try:
            self._waiting[thread] = outcome
            self.loop.call_soon_threadsafe(self._begin, work, outcome)
            return outcome.result()
        except BaseException:
            # An interrupt may strike between the two lines as well (which is why this is not
            # asyncio's run_coroutine_threadsafe): what has not begun by now never will.
            outcome.cancel()
            raise
        finally:
            self._waiting.pop(thread, None)

    @property
    def forked(self) -> bool:
        """Whether the thread is another process's: a fork has only the thread that forked."""
        return os.getpid() != self._process

    def cancel_wait(self, thread: int) -> None:
        """What an interrupt is to the main thread: end the wait of another one, by its ident.

        There, `run` raises `concurrent.futures.CancelledError`.
        """
        outcome = self._waiting.get(thread)
        if outcome is not None:
            outcome.cancel()

    def _begin(self, work: Coroutine[Any, Any, T], outcome: Future[T]) -> None:
        if outcome.cancelled():
            work.close()
            return
        task = self.loop.create_task(work)
        task.add_done_callback(functools.partial(_report, outcome))

        def give_up(outcome: Future[T]) -> None:
            if outcome.cancelled():
                self.loop.call_soon_threadsafe(task.cancel)

        outcome.add_done_callback(give_up)

    def join(self, seconds: float) -> None:
        """Wait for the thread to end, after its loop was stopped."""
        self._thread.join(seconds)


def _report(outcome: Future[T], task: asyncio.Task[T]) -> None:
    """Hand a task's outcome to the thread that waits, unless it has given up."""
    if task.cancelled():
        outcome.cancel()
        return
    error = task.exception()
    with contextlib.suppress(InvalidStateError):
        if error is None:
            outcome.set_result(task.result())
        else:
            outcome.set_exception(error)


_lock = threading.Lock()
_thread: LoopThread | None = None
_at_exit: list[Cleanup] = []


def network_thread() -> LoopThread:
    """The process's network thread, started on first use."""
    global _thread
    with _lock:
        if _thread is None:
            _thread = LoopThread()
            atexit.register(_stop_all)
        return _thread


def cancel_wait(thread: int) -> None:
    """`LoopThread.cancel_wait`, if anything was ever asked of the network."""
    if _thread is not None:
        _thread.cancel_wait(thread)


def at_exit(cleanup: Cleanup) -> None:
    """Register a coroutine function to be run on the loop when the interpreter ends."""
    _at_exit.append(cleanup)


def forget_at_exit(cleanup: Cleanup) -> None:
    if cleanup in _at_exit:
        _at_exit.remove(cleanup)


def _stop_all() -> None:
    """End daemons while their loop still runs: hivemind's finalizers fail without one.

    The thread is joined, too: one that still runs when the interpreter is torn down is ended by
    unwinding its stack, which kills the process if C++ code is on it.
    """
    if _thread is None or _thread.forked:
        return
    loop = _thread.loop

    async def stop() -> None:
        await asyncio.gather(*(cleanup() for cleanup in _at_exit), return_exceptions=True)

    future = asyncio.run_coroutine_threadsafe(stop(), loop)
    try:
        future.result(_STOP_TIMEOUT)
    except TimeoutError:
        future.cancel()
    loop.call_soon_threadsafe(loop.stop)
    _thread.join(_STOP_TIMEOUT)
