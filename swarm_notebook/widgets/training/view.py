"""What a `TrainingMonitor` shows, and the thread that keeps it up to date while a run goes on."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import traitlets

from swarm_notebook.client.telemetry import Failover, Subscription
from swarm_notebook.widgets.parts.base import Widget
from swarm_notebook.widgets.parts.traits import Flag, MaybeReal, Real, String, Whole
from swarm_notebook.widgets.training.curves import as_html
from swarm_notebook.widgets.training.record import TrainingRecord

if TYPE_CHECKING:
    from swarm_notebook.swarm import Swarm

TICK_SECONDS = 0.25
KEPT = 4  # runs before the present one: as many as there are colours that all people tell apart
TOLD = 5  # failovers that are shown in words


class TrainingView(Widget, module="monitor"):
    """The curves and facts of one run at a time; `_changing` guards its record and its state."""

    state: String = traitlets.Unicode("ready").tag(sync=True)
    step: Whole = traitlets.Int(help="the last one that was logged").tag(sync=True)
    total: Whole = traitlets.Int(0, help="0: unknown").tag(sync=True)
    names: traitlets.List[str] = traitlets.List(traitlets.Unicode(), help="of the curves").tag(
        sync=True
    )
    points: traitlets.List[list[Any]] = traitlets.List(
        traitlets.List(), help="[step, value or null per name], thinned out"
    ).tag(sync=True)
    runs: traitlets.List[dict[str, Any]] = traitlets.List(
        help="runs before this one: name, names, points"
    ).tag(sync=True)
    run_name: String = traitlets.Unicode("run 1").tag(sync=True)
    smoothing: Real = traitlets.Float(
        0.0, help="weight of what came before in the mean that is drawn, 0 to 0.99"
    ).tag(sync=True)
    outcome: String = traitlets.Unicode(help="of a run that was stopped: whether it was saved").tag(
        sync=True
    )
    alarm: String = traitlets.Unicode(help="a value that is no number").tag(sync=True)
    elapsed: Real = traitlets.Float(help="seconds, without pauses").tag(sync=True)
    tokens: Whole = traitlets.Int().tag(sync=True)
    speed: MaybeReal = traitlets.Float(None, allow_none=True, help="tokens per second").tag(
        sync=True
    )
    retries: Whole = traitlets.Int(help="requests that were repeated").tag(sync=True)
    failovers: Whole = traitlets.Int(help="servers lost, once per step").tag(sync=True)
    told: traitlets.List[str] = traitlets.List(traitlets.Unicode(), help="the last failovers").tag(
        sync=True
    )
    saves: Flag = traitlets.Bool(help="stopping saves").tag(sync=True)

    NEEDS_SWARM = False  # what a run has logged stays true

    def __init__(self, swarm: Swarm | None, **traits: Any) -> None:
        super().__init__(**traits)
        self._swarm = swarm
        self._record = TrainingRecord(time.perf_counter())
        self._changing = threading.Condition()
        self._shown = False
        self._ended = threading.Event()
        self._begun = 1
        self._ticker: threading.Thread | None = None

    @property
    def history(self) -> list[dict[str, float]]:
        """Every logged step, a dict each."""
        return self._record.history

    def summary(self) -> str:
        return f"{self.state}, {len(self.history)} steps"

    def picture(self) -> str:
        total = f" of {self.total}" if self.total else ""
        line = f"{self.state} at step {self.step}{total}"
        if self.outcome:
            line += f"; {self.outcome}"
        if self.alarm:
            line += f"; {self.alarm}"
        if self.retries:
            line += f"; {self.retries} retries, {self.failovers} failovers"
        return as_html("Training", line, self.names, self.points)

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        self._shown = True
        return super()._repr_mimebundle_(**options)

    def _show(self) -> None:
        """Display the monitor, if it is in a notebook and nobody has displayed it."""
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        shell: Any = get_ipython()
        if not self._shown and shell is not None and hasattr(shell, "kernel"):
            display(self)

    def _begin_anew(self) -> None:
        """Follow a new run; the curves of those before stay beside it."""
        runs = list(self.runs)
        if self.points:
            runs.append({"name": self.run_name, "names": self.names, "points": self.points})
            self._begun += 1
        self._record = TrainingRecord(time.perf_counter())
        self.update(
            runs=runs[-KEPT:], run_name=f"run {self._begun}", outcome="",
            state="running", step=0, names=[], points=[], alarm="", error="", told=[],
            elapsed=0.0, tokens=0, speed=None, retries=0, failovers=0,
        )  # fmt: skip
        self._ended.clear()
        self._ticker = threading.Thread(target=self._tick, name="training-monitor", daemon=True)
        self._ticker.start()

    def _end(self, state: str, error: BaseException | None = None) -> None:
        """The run is over; the last that is known of it is shown."""
        self._ended.set()
        if self._ticker is not None:
            self._ticker.join()
        self._flush()
        told = f"{type(error).__name__}: {error}" if error is not None else ""
        self.update(state=state, error=told)

    def _flush(self) -> None:
        """Send the views what is new."""
        with self._changing:
            new = self._record.shown(time.perf_counter())
        self.update(**new)

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
            with self._changing:
                first = self._record.lose(event.peer, event.when)
            self.retries += 1
            if first:
                text = f"step {self._record.step + 1}: {event.reason}"
                self.update(failovers=self.failovers + 1, told=[*self.told, text][-TOLD:])
