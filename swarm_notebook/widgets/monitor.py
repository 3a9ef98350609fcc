"""A training run as it goes: curves, speed, what the swarm lost meanwhile; pause, resume, stop.

    monitor = TrainingMonitor(swarm, total=len(batches), save=save_my_adapter)

    def train():
        for batch in batches:
            ...
            monitor.log(loss=loss, learning_rate=rate, grad_norm=norm, tokens=batch.numel())

    monitor.run(train)           # in the background; this cell returns at once
    with monitor: train()        # or in this cell, which is busy until the end

    trainer = Trainer(..., callbacks=[monitor.callback()])
    monitor.run(trainer.train)   # or: with monitor: trainer.train()

`log` is where a run obeys: it waits there while the run is paused, and ends it there when it was
stopped, by an exception that ``with monitor`` (or `run`) catches after calling ``save``.

**Buttons need `run`.** While a cell is busy, whether a click reaches Python depends on the kernel:
ipykernel 6 and 7.4 deliver it when the cell has ended, 7.0 to 7.3 do at once if the front end has
subshells. The curves are live in either case, and interrupting the kernel is a stop, too: it saves.
A view whose click stays unanswered says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from swarm_notebook.progress import cell_thread
from swarm_notebook.widgets.training.run import TrainingRun, TrainingStopped

if TYPE_CHECKING:
    from transformers import TrainerCallback


__all__ = ["TrainingMonitor", "TrainingStopped"]

logger: logging.Logger = logging.getLogger(__name__)


class TrainingMonitor(TrainingRun):
    """Curves of a training run, over those of the runs before, and the buttons that steer it.

    Args:
        swarm: whose retries and failovers are counted; None for a local model.
        total: how many steps there will be, if that is known.
        save: called, in the thread that trains, when the run is stopped before its end. What it
            returns, such as a path, is shown as the place.

    Attributes:
        state: ``ready``, ``running``, ``paused``, ``stopping``, ``stopped``, ``finished`` or
            ``failed``.
        history: every logged step, a dict each: good for ``pandas.DataFrame``.
    """

    _thread: threading.Thread | None = None
    _outcome: tuple[object, BaseException | None] = (None, None)

    def log(
        self,
        *,
        loss: Any = None,
        learning_rate: Any = None,
        grad_norm: Any = None,
        tokens: int = 0,
        step: int | None = None,
        **more: Any,
    ) -> None:
        """A step is done; waits while the run is paused.

        Args:
            loss, learning_rate, grad_norm, more: numbers, or tensors of one element.
            tokens: how many this step trained on.
            step: its number; None is the one after the last.

        Raises:
            RuntimeError: the monitor does not run: this stands outside of ``with monitor``.
            TypeError: a value is not a number.
            TrainingStopped: the run was stopped. Let it pass.
        """
        given = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm, **more}
        values = {name: _number(name, value) for name, value in given.items() if value is not None}
        if self.note(self._record.step + 1 if step is None else step, values, tokens):
            raise TrainingStopped

    def run(self, train: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Train in the background, and show the monitor; see `wait`.

        Raises:
            RuntimeError: a run is under way.
        """
        if self.under_way or (self._thread is not None and self._thread.is_alive()):
            raise RuntimeError("run: this monitor follows a run already; make another one")
        self._show()

        def work() -> None:
            self._outcome = (None, None)
            try:
                with self:
                    self._outcome = (train(*args, **kwargs), None)
            except BaseException as error:
                self._outcome = (None, error)
                logger.exception("the training run failed")

        self._thread = cell_thread("training", work)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> object:
        """Wait for a run in the background; returns what it returned, None if it was stopped.

        Raises:
            TimeoutError: it still runs after ``timeout`` seconds.
            Exception: what the run raised.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"the run is at step {self._record.step} after {timeout} s")
        result, error = self._outcome
        if error is not None:
            raise error
        return result

    def callback(self) -> TrainerCallback:
        """For ``Trainer(callbacks=[…])``; stopping also writes one of the trainer's checkpoints."""
        from swarm_notebook.widgets.training.callback import MonitorCallback

        return MonitorCallback(self)


def _number(name: str, value: Any) -> float:
    try:
        if hasattr(value, "detach"):
            value = value.detach()  # torch warns where a number is made of what has a gradient
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: {type(value).__name__} is not one number") from None
