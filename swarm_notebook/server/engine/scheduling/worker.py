"""The one thread in which torch runs, and the way in and out of it.

The loop's side calls `submit` and awaits ``job.future``: one hop to the thread through
`Arrivals`, one hop back through ``call_soon_threadsafe``. In the thread, everything that has
arrived goes into the `Schedule`, which says what runs next: one job, or several that run as one
batch. A job that is cancelled before it begins never runs. One that has begun
runs to its end (a forward pass cannot be stopped from outside), and `Job.on_settled` tells when:
whoever owns the memory that the job writes to frees it then and not earlier.

A job whose function is a generator comes in `pieces`: after each one others have their
turn, and a job that was cancelled ends.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from swarm_notebook.server.engine.scheduling.arrivals import Arrivals
from swarm_notebook.server.engine.scheduling.pieces import Pieces
from swarm_notebook.server.engine.scheduling.scheduler import (
    UPKEEP,
    Admission,
    ChunkSizer,
    Kind,
    PassSizer,
    Schedule,
    Task,
)
from swarm_notebook.server.engine.scheduling.turns import Turns
from swarm_notebook.server.engine.scheduling.window import BatchWindow

logger: logging.Logger = logging.getLogger(__name__)

# Takes the one argument of each of several jobs; gives, for each, its result or its error.
RunBatch = Callable[[Sequence[Any]], Sequence[Any]]


class _More:
    """The outcome of a piece that was not the last, and how much it had."""

    __slots__ = ("work",)

    def __init__(self, work: int):
        self.work = work


class Job:
    """One call in the torch thread. What begins with ``_run`` belongs there, all else to the loop.

    Args:
        run_batch: how jobs of the task's group run as one.

    Attributes:
        arrived: when it was submitted, by the monotonic clock.
    """

    __slots__ = (
        "_arguments",
        "_callbacks",
        "_claim",
        "_function",
        "_pieces",
        "_run_batch",
        "_sizer",
        "_work",
        "arrived",
        "future",
        "settled",
        "task",
    )

    future: asyncio.Future[Any]
    settled: bool
    task: Task

    def __init__(
        self,
        future: asyncio.Future[Any],
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        task: Task,
        run_batch: RunBatch | None,
    ):
        self.future, self.task = future, task
        self.arrived: float = time.monotonic()
        self._function, self._arguments, self._run_batch = function, arguments, run_batch
        # Whoever pops the one element, thread or canceller, decides whether the job runs.
        self._claim = [True]
        self._pieces: Pieces[Any] | None = None
        self._sizer: ChunkSizer | None = None
        self._work = task.work  # what is left of it
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

    @property
    def _begun(self) -> bool:
        """In the thread: whether a piece of it has run."""
        return self._pieces is not None

    @property
    def _in_pieces(self) -> bool:
        """In the thread: whether it takes, or has taken, more than one piece."""
        return self._begun and self._work < self.task.work

    def _run(self, room: int) -> Any:
        """In the thread: the result, or the error, which belongs to who awaits the future.

        Of a job in pieces, the next of at most ``room``: `_More` if it was not the last.
        """
        try:
            if self._pieces is None:
                found = self._function(*self._arguments)
                if not isinstance(found, Generator):
                    return found
                self._pieces = found
                next(found)  # it asks for room
            if self.future.cancelled():
                self._pieces.close()
                return None
            return self._run_piece(self._pieces, room)
        except Exception as caught:
            return caught

    def _run_piece(self, pieces: Pieces[Any], room: int) -> Any:
        try:
            done = pieces.send(room)
        except StopIteration as end:
            return end.value
        self._work -= done
        return _More(done)

    @staticmethod
    def _run_all(jobs: Sequence[Job], room: int) -> Sequence[Any]:
        """In the thread: results or errors of jobs of one group."""
        run_batch = jobs[0]._run_batch
        if run_batch is None or jobs[0].task.group is None:
            return [job._run(room) for job in jobs]
        try:
            return run_batch([argument for job in jobs for argument in job._arguments])
        except Exception as caught:
            return [caught] * len(jobs)

    def _finish(self, outcome: Any) -> None:
        if not self.future.done():
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        self._settle()

    def _settle(self) -> None:
        self.settled = True
        for callback in self._callbacks:
            callback()
        self._callbacks.clear()


class ComputeThread:
    """Runs jobs in its own thread, in the order that the schedule decides.

    Attributes:
        on_ran: told, in the thread, what has run (of a batch, one task) and how many seconds.
    """

    def __init__(self) -> None:
        self.on_ran: Callable[[Task, float], None] = lambda _task, _seconds: None
        self._arrived: Arrivals[Job | None] = Arrivals()
        self._schedule: Schedule[Job] = Schedule()
        self._admission = Admission()
        self._chunks = ChunkSizer()
        self._passes = PassSizer()
        self._window = BatchWindow()
        self._turns = Turns()
        self._steps = self._step_calls = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        task: Task = UPKEEP,
        run_batch: RunBatch | None = None,
    ) -> Job:
        """Queue a call; to be called in the asyncio loop that wants the result.

        Args:
            task: what the scheduler should know of it.
            run_batch: how several jobs of the task's group run as one.

        Raises:
            ServerBusy: too much is queued already.
        """
        counts = self._admission.enter(task)
        job = Job(asyncio.get_running_loop().create_future(), function, arguments, task, run_batch)
        if counts:
            job.on_settled(lambda: self._admission.leave(task))
        # Only a step that could share a call may have to wait for others.
        self._arrived.put(job, urgent=task.kind is not Kind.STEP or task.group is None)
        return job

    def chunk_tokens(self, client: str) -> int:
        """How many tokens of a client's prefill to submit at once, as things are."""
        return self._chunks.size(self._piece_seconds(client))

    def _piece_seconds(self, client: str) -> float:
        others_wait = self._schedule.has_others(client)
        return self._turns.piece_seconds(client, time.monotonic(), others_wait=others_wait)

    def facts(self) -> dict[str, int]:
        """How many steps have run since the start, and in how many calls of the blocks."""
        return {"steps": self._steps, "step_calls": self._step_calls}

    def stop(self, timeout: float = 30.0) -> None:
        """End the thread after the jobs that are queued."""
        self._arrived.put(None, urgent=True)
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            jobs: Sequence[Job] = ()
            try:
                if not (jobs := self._take()):
                    return
                self._serve(jobs)
            except Exception as error:
                # Without memory anything may fail. Whoever waits hears of it, and others go on.
                logger.exception("the torch thread failed between two jobs")
                if jobs:
                    loop = jobs[0].future.get_loop()
                    loop.call_soon_threadsafe(_finish_all, jobs, [error] * len(jobs))

    def _serve(self, jobs: Sequence[Job]) -> None:
        begun = time.monotonic()
        outcomes = Job._run_all(jobs, self._room(jobs[0]))
        ended = time.monotonic()
        if isinstance(outcomes[0], _More):
            self._schedule.add(jobs[0].task, jobs[0], begun=True)
        else:
            loop = jobs[0].future.get_loop()
            loop.call_soon_threadsafe(_finish_all, jobs, outcomes)
        try:
            self._learn(jobs, outcomes[0], ended - begun, ended)
        except Exception:
            logger.exception("nothing was learnt from a job")

    def _room(self, job: Job) -> int:
        """How much the next piece of a job may have, if it comes in pieces."""
        if not job.task.work:
            return 0
        if job._sizer is None:
            job._sizer = self._passes.begin(job.task)
        return job._sizer.size(self._piece_seconds(job.task.client))

    def _take(self) -> list[Job]:
        """The jobs to run next as one; waits for some, and is empty when all is done."""
        while True:
            self._let_in()
            if not self._schedule:
                return []
            self._wait_for_more()
            jobs = [job for _, job in self._schedule.take() if job._begun or job._claimed()]
            if jobs:
                return jobs

    def _let_in(self) -> None:
        """Move what has arrived to the schedule; wait if there is nothing at all."""
        self._accept_all()
        while not self._schedule and not self._stopping:
            self._arrived.wait(1)
            self._accept_all()

    def _wait_for_more(self) -> None:
        """Wait a moment for steps that could share the next call, if some are on their way."""
        while patience := self._window.patience(self._schedule.batchable, time.monotonic()):
            in_time = self._arrived.wait(self._window.awaited, patience)
            if not self._accept_all() and not in_time:
                return

    def _accept_all(self) -> bool:
        """Move what has arrived to the schedule; whether that is anything."""
        arrived = self._arrived.take()
        for job in arrived:
            if job is None:
                self._stopping = True
            else:
                self._schedule.add(job.task, job)
                self._window.came(job.task, job.arrived)
                self._turns.came(job.task, job.arrived)
        return bool(arrived)

    def _learn(self, jobs: Sequence[Job], outcome: Any, seconds: float, now: float) -> None:
        tasks = [job.task for job in jobs]
        self._schedule.ran(tasks, seconds)
        self.on_ran(tasks[0], seconds)
        if tasks[0].kind is not Kind.PREFILL_CHUNK and not jobs[0]._in_pieces:
            self._turns.ran(tasks, seconds, now)
        if tasks[0].kind is Kind.STEP:
            self._window.ran(tasks, seconds, now)
            self._steps += len(tasks)
            self._step_calls += 1
        elif tasks[0].kind is Kind.PREFILL_CHUNK:
            self._chunks.ran(tasks[0].tokens, seconds)
        elif jobs[0]._sizer is not None and not isinstance(outcome, Exception):
            self._learn_piece(jobs[0], outcome, seconds)

    def _learn_piece(self, job: Job, outcome: Any, seconds: float) -> None:
        more = isinstance(outcome, _More)
        # What the last piece had is what was left.
        work = outcome.work if more else job._work
        first = work + (job._work if more else 0) >= job.task.work
        if not work:
            return
        if first:
            self._passes.began(work, seconds)
        if more and job._sizer is not None:
            job._sizer.ran(work, seconds)


def _finish_all(jobs: Sequence[Job], outcomes: Sequence[Any]) -> None:
    for job, outcome in zip(jobs, outcomes, strict=True):
        job._finish(outcome)
