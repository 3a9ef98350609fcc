"""The one thread in which torch runs, and the way in and out of it.

The loop's side calls `submit` and awaits ``job.future``: one hop to the thread through a
`SimpleQueue`, one hop back through ``call_soon_threadsafe``. Jobs run one after the other, in the
order of their arrival. A job that is cancelled before it begins never runs. One that has begun
runs to its end (a forward pass cannot be stopped from outside), and `Job.on_settled` tells when:
whoever owns the memory that the job writes to frees it then and not earlier.

`_take` is where a scheduler that joins the steps of several sessions would choose its work.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Job:
    """One call in the torch thread. All methods but `_run` belong to the loop."""

    __slots__ = ("_arguments", "_callbacks", "_claim", "_function", "future", "settled")

    def __init__(self, future: asyncio.Future, function: Callable[..., Any], arguments: tuple):
        self.future = future
        self._function, self._arguments = function, arguments
        # Whoever pops the one element, thread or canceller, decides whether the job runs.
        self._claim = [True]
        self._callbacks: list[Callable[[], None]] = []
        self.settled = False

    def cancel(self) -> None:
        """Give up on the result; if the job has not begun, it never will."""
        self.future.cancel()
        if self._claimed():
            self._settle()

    def on_settled(self, callback: Callable[[], None]) -> None:
        """Call back as soon as the thread has nothing more to do with this job."""
        if self.settled:
            callback()
        else:
            self._callbacks.append(callback)

    def _claimed(self) -> bool:
        try:
            return self._claim.pop()
        except IndexError:
            return False

    def _run(self) -> None:
        """In the thread: call the function and hand its outcome to the loop."""
        if not self._claimed():
            return
        result, error = None, None
        try:
            result = self._function(*self._arguments)
        except Exception as caught:  # whatever it is, it belongs to the one who awaits the future
            error = caught
        self.future.get_loop().call_soon_threadsafe(self._finish, result, error)

    def _finish(self, result: Any, error: Exception | None) -> None:
        if not self.future.done():
            if error is None:
                self.future.set_result(result)
            else:
                self.future.set_exception(error)
        self._settle()

    def _settle(self) -> None:
        self.settled = True
        for callback in self._callbacks:
            callback()
        self._callbacks.clear()


class ComputeThread:
    """Runs jobs one by one in its own thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Job:
        """Queue a call; to be called in the asyncio loop that wants the result."""
        job = Job(asyncio.get_running_loop().create_future(), function, arguments)
        self._queue.put(job)
        return job

    def stop(self, timeout: float = 30.0) -> None:
        """End the thread after the jobs that are queued."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _work(self) -> None:
        while (job := self._take()) is not None:
            job._run()

    def _take(self) -> Job | None:
        return self._queue.get()
