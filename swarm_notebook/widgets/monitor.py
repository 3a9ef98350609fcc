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

import contextvars
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import traitlets

from swarm_notebook.client.events import Failover, Subscription
from swarm_notebook.widgets.base import Widget, action
from swarm_notebook.widgets.curves import Curves, as_html

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from swarm_notebook.swarm import Swarm

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.25
SPEED_SECONDS = 10.0  # tokens per second are of the last so many
NOTED = 512  # moments of the last steps
TOLD = 5  # failovers that are shown in words


class TrainingStopped(BaseException):
    """The run was stopped; raised by `TrainingMonitor.log` and caught by ``with monitor``.

    No Exception, so that a loop which survives bad batches does not survive this.
    """


class TrainingMonitor(Widget, module="monitor"):
    """Curves of one training run at a time, and the buttons that steer it.

    Args:
        swarm: whose retries and failovers are counted; None for a local model.
        total: how many steps there will be, if that is known.
        save: called, in the thread that trains, when the run is stopped before its end.

    Attributes:
        state: ``ready``, ``running``, ``paused``, ``stopping``, ``stopped``, ``finished`` or
            ``failed``.
        history: every logged step, a dict each: good for ``pandas.DataFrame``.
    """

    state = traitlets.Unicode("ready").tag(sync=True)
    step = traitlets.Int(help="the last one that was logged").tag(sync=True)
    total = traitlets.Int(0, help="0: unknown").tag(sync=True)
    names = traitlets.List(traitlets.Unicode(), help="of the curves").tag(sync=True)
    points = traitlets.List(
        traitlets.List(), help="[step, value or null per name], thinned out"
    ).tag(sync=True)
    alarm = traitlets.Unicode(help="a value that is no number").tag(sync=True)
    elapsed = traitlets.Float(help="seconds, without pauses").tag(sync=True)
    tokens = traitlets.Int().tag(sync=True)
    speed = traitlets.Float(None, allow_none=True, help="tokens per second").tag(sync=True)
    retries = traitlets.Int(help="requests that were repeated").tag(sync=True)
    failovers = traitlets.Int(help="servers lost, once per step").tag(sync=True)
    told = traitlets.List(traitlets.Unicode(), help="the last failovers").tag(sync=True)
    saves = traitlets.Bool(help="stopping saves").tag(sync=True)
    background = traitlets.Bool(help="started by run").tag(sync=True)

    def __init__(
        self,
        swarm: Swarm | None = None,
        *,
        total: int | None = None,
        save: Callable[[], object] | None = None,
        **traits: Any,
    ) -> None:
        super().__init__(total=total or 0, saves=save is not None, **traits)
        self.history: list[dict[str, float]] = []
        self._swarm, self._save = swarm, save
        self._curves = Curves()
        self._obey = threading.Condition()
        self._depth = 0
        self._thread: threading.Thread | None = None
        self._outcome: tuple[object, BaseException | None] = (None, None)
        self._shown = False
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None
        self._forget()

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
        if self.note(self._step + 1 if step is None else step, values, tokens):
            raise TrainingStopped

    def note(self, step: int, values: dict[str, float], tokens: int = 0) -> bool:
        """As `log`, for callbacks of frameworks: returns whether the run is to end.

        Raises:
            RuntimeError: the monitor does not run.
        """
        if not self._depth:
            raise RuntimeError("log: put the loop inside `with monitor:`, or start it by run")
        with self._obey:
            self._take(step, values, tokens)
            while self.state == "paused":
                self._obey.wait(1.0)  # an interrupt gets through in between
            return self.state == "stopping"

    def run(self, train: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Train in the background, and show the monitor; see `wait`.

        Raises:
            RuntimeError: a run is under way.
        """
        if self.under_way or (self._thread is not None and self._thread.is_alive()):
            raise RuntimeError("run: this monitor follows a run already; make another one")
        self._show()
        self.background = True
        # What the run prints lands in this cell.
        context = contextvars.copy_context()

        def work() -> None:
            self._outcome = (None, None)
            try:
                with self:
                    self._outcome = (train(*args, **kwargs), None)
            except BaseException as error:
                self._outcome = (None, error)
                logger.exception("the training run failed")

        self._thread = threading.Thread(
            target=context.run, args=(work,), name="training", daemon=True
        )
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
                raise TimeoutError(f"the run is at step {self._step} after {timeout} s")
        result, error = self._outcome
        if error is not None:
            raise error
        return result

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

    @property
    def under_way(self) -> bool:
        """Whether a run is inside ``with monitor`` now."""
        return self._depth > 0

    def callback(self) -> TrainerCallback:
        """For ``Trainer(callbacks=[…])``; stopping also writes one of the trainer's checkpoints."""
        from swarm_notebook.widgets.trainer_callback import MonitorCallback

        return MonitorCallback(self)

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
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

    def summary(self) -> str:
        return f"{self.state}, {len(self.history)} steps"

    def picture(self) -> str:
        total = f" of {self.total}" if self.total else ""
        line = f"{self.state} at step {self.step}{total}"
        if self.alarm:
            line += f"; {self.alarm}"
        if self.retries:
            line += f"; {self.retries} retries, {self.failovers} failovers"
        return as_html("Training", line, self.names, self.points)

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        self._shown = True
        return super()._repr_mimebundle_(**options)

    # What happens in the thread that trains.

    def _forget(self) -> None:
        self.history, self._curves = [], Curves()
        self._step, self._tokens = 0, 0
        self._began, self._paused = time.perf_counter(), 0.0
        self._noted: deque[tuple[float, int]] = deque(maxlen=NOTED)  # when, how many tokens
        self._counted: set[tuple[str, float]] = set()

    def _begin(self) -> None:
        self._show()
        self._forget()
        self.update(
            state="running", step=0, names=[], points=[], alarm="", error="", told=[],
            elapsed=0.0, tokens=0, speed=None, retries=0, failovers=0,
        )  # fmt: skip
        self._ended.clear()
        self._ticker = threading.Thread(target=self._tick, name="training-monitor", daemon=True)
        self._ticker.start()

    def _take(self, step: int, values: dict[str, float], tokens: int) -> None:
        """Remember a step, or more of the last one."""
        if not self.history or step != self._step:
            self.history.append({"step": step})
        row = self.history[-1]
        row.update(values)
        if tokens:
            row["tokens"] = row.get("tokens", 0) + tokens
        self._step, self._tokens = step, self._tokens + tokens
        self._curves.add(step, values)
        self._noted.append((time.perf_counter(), tokens))
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken and not self.alarm:
            self.update(alarm=f"{broken[0]} is {values[broken[0]]} since step {step}")

    def _end_stopped(self) -> None:
        if self.state == "stopped":
            return  # inside of another `with monitor`
        self._flush()
        try:
            if self._save is not None:
                self._save()
        except BaseException as failure:
            self._end("failed", failure)
            raise
        self._end("stopped")

    def _end(self, state: str, error: BaseException | None = None) -> None:
        self._ended.set()
        if self._ticker is not None:
            self._ticker.join()
        self._flush()
        told = f"{type(error).__name__}: {error}" if error is not None else ""
        self.update(state=state, error=told)

    def _turn(self, before: str, after: str) -> None:
        with self._obey:
            if self.state != before:
                return
            now = time.perf_counter()
            if after == "paused":
                self._paused = now
            elif before == "paused":
                self._began += now - self._paused
                self._noted.clear()
            self.update(state=after)
            self._obey.notify_all()

    # What happens in the ticker's thread.

    def _tick(self) -> None:
        with self._swarm.events() if self._swarm is not None else nullcontext() as watch:
            while not self._ended.wait(TICK_SECONDS):
                self._count(watch)
                self._flush()
            self._count(watch)

    def _count(self, watch: Subscription | None) -> None:
        """A step that asks a lost server several times has several retries and one failover."""
        for event in watch.drain() if watch is not None else ():
            if not isinstance(event, Failover):
                continue
            with self._obey:
                before = max((when for when, _ in self._noted if when < event.when), default=0.0)
                loss = (event.peer, before)
                known = loss in self._counted
                self._counted.add(loss)
            self.retries += 1
            if not known:
                text = f"step {self._step + 1}: {event.reason}"
                self.update(failovers=self.failovers + 1, told=[*self.told, text][-TOLD:])

    def _flush(self) -> None:
        """Send the views what is new."""
        with self._obey:
            now = self._paused if self.state == "paused" else time.perf_counter()
            names, points = self._curves.shown()
            new = {
                "step": self._step,
                "names": names,
                "points": points,
                "elapsed": now - self._began,
                "tokens": self._tokens,
                "speed": self._speed(now),
            }
        self.update(**new)

    def _speed(self, now: float) -> float | None:
        """Tokens per second of the last steps; None while there are too few."""
        last = [(when, count) for when, count in self._noted if when > now - SPEED_SECONDS]
        last = last if len(last) > 1 else list(self._noted)[-2:]
        tokens = sum(count for _, count in last[1:])
        return tokens / (last[-1][0] - last[0][0]) if tokens else None

    def _show(self) -> None:
        """Display the monitor, if it is in a notebook and nobody has displayed it."""
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        shell: Any = get_ipython()
        if not self._shown and shell is not None and hasattr(shell, "kernel"):
            display(self)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: {type(value).__name__} is not one number") from None
