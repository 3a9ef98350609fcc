"""A training run that obeys: it logs steps, waits while it is paused and ends when it is stopped.

`TrainingRun` is the part of a `TrainingMonitor` that training loops and callbacks of frameworks
talk to: one `note` per step between ``__enter__`` and ``__exit__``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from swarm_notebook.widgets.parts.base import action
from swarm_notebook.widgets.training.view import TrainingView

if TYPE_CHECKING:
    from swarm_notebook.swarm import Swarm


class TrainingStopped(BaseException):
    """The run was stopped; raised by `TrainingMonitor.log` and caught by ``with monitor``.

    No Exception, so that a loop which survives bad batches does not survive this.
    """


class TrainingRun(TrainingView):
    """One run at a time, and what steers it: `pause`, `resume` and `stop`.

    Args:
        swarm: whose retries and failovers are counted; None for a local model.
        total: how many steps there will be, if that is known.
        save: called, in the thread that trains, when the run is stopped before its end.
    """

    def __init__(
        self,
        swarm: Swarm | None = None,
        *,
        total: int | None = None,
        save: Callable[[], object] | None = None,
        **traits: Any,
    ) -> None:
        super().__init__(swarm, total=total or 0, saves=save is not None, **traits)
        self._save = save
        self._depth = 0  # of nested `with`; the outermost one is the run

    @property
    def under_way(self) -> bool:
        """Whether a run is inside ``with monitor`` now."""
        return self._depth > 0

    def note(self, step: int, values: dict[str, float], tokens: int = 0) -> bool:
        """A step is done; waits while the run is paused; returns whether the run is to end.

        Raises:
            RuntimeError: the monitor does not run.
        """
        if not self._depth:
            raise RuntimeError("log: put the loop inside `with monitor:`, or start it by run")
        with self._changing:
            alarm = self._record.take(step, values, tokens, time.perf_counter())
            if alarm and not self.alarm:
                self.update(alarm=alarm)
            while self.state == "paused":
                self._changing.wait(1.0)  # an interrupt gets through in between
            return self.state == "stopping"

    @action
    def pause(self) -> None:
        """Let the run wait after the present step."""
        self._turn("running", "paused")

    @action
    def resume(self) -> None:
        """Go on."""
        self._turn("paused", "running")

    @action
    def stop(self) -> None:
        """End the run after the present step, and save."""
        self._turn("running", "stopping")
        self._turn("paused", "stopping")

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._show()
            self._begin_anew()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        self._depth -= 1
        # A stop may also come after the last step was logged.
        asked = error is None and self.state == "stopping"
        if asked or isinstance(error, (TrainingStopped, KeyboardInterrupt)):
            self._end_stopped()
        elif error is not None:
            self._end("failed", error)
        elif self._depth == 0 and self.state != "stopped":
            self._end("finished")
        return isinstance(error, TrainingStopped)

    def _end_stopped(self) -> None:
        if self.state == "stopped":
            return  # inside of another `with monitor`
        self._flush()
        try:
            if self._save is not None:
                self.saved(self._save())
        except BaseException as failure:
            self._end("failed", failure)
            raise
        if not self.outcome:
            self.update(outcome="not saved; to save, give TrainingMonitor(save=…)")
        self._end("stopped")

    def saved(self, place: object) -> None:
        """The run was saved, there, if that is known."""
        there = f" to {place}" if isinstance(place, str | Path) and str(place) else ""
        self.update(outcome=f"saved{there}")

    def _turn(self, before: str, after: str) -> None:
        with self._changing:
            if self.state != before:
                return
            if after == "paused":
                self._record.pause(time.perf_counter())
            else:
                self._record.resume(time.perf_counter())
            self.update(state=after)
            self._changing.notify_all()
