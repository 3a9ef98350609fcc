"""One training run as it was logged: its steps, curves, clock, speed, and the servers that it lost.

Pure: moments are those of `time.perf_counter` and are given; who uses it from several threads
guards it.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from swarm_notebook.widgets.training.curves import Curves

SPEED_SECONDS = 10.0  # tokens per second are of the last so many
NOTED = 512  # moments of the last steps


class TrainingRecord:
    """What is known of a run that began at ``now``.

    Attributes:
        history: every logged step, a dict each.
        step: the last one.
        tokens: how many all steps trained on.
    """

    def __init__(self, now: float) -> None:
        self.history: list[dict[str, float]] = []
        self.step: int = 0
        self.tokens: int = 0
        self._curves = Curves()
        self._began = now
        self._paused: float | None = None
        self._noted: deque[tuple[float, int]] = deque(maxlen=NOTED)  # when, how many tokens
        self._losses: set[tuple[str, float]] = set()

    def take(self, step: int, values: dict[str, float], tokens: int, now: float) -> str:
        """Remember a step, or more of the last one; returns what is alarming about it."""
        if not self.history or step != self.step:
            self.history.append({"step": step})
        row = self.history[-1]
        row.update(values)
        if tokens:
            row["tokens"] = row.get("tokens", 0) + tokens
        self.step, self.tokens = step, self.tokens + tokens
        self._curves.add(step, values)
        self._noted.append((now, tokens))
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        return f"{broken[0]} is {values[broken[0]]} since step {step}" if broken else ""

    def pause(self, now: float) -> None:
        """The clock stands still."""
        self._paused = now

    def resume(self, now: float) -> None:
        """It goes on; if it was not standing still, nothing changes."""
        if self._paused is not None:
            self._began += now - self._paused
            self._paused = None
            self._noted.clear()

    def lose(self, peer: str, when: float) -> bool:
        """A request to a server failed; whether it is the first one to it in this step."""
        before = max((noted for noted, _ in self._noted if noted < when), default=0.0)
        known = (peer, before) in self._losses
        self._losses.add((peer, before))
        return not known

    def shown(self, now: float) -> dict[str, Any]:
        """The traits of `TrainingView` that follow from it."""
        now = now if self._paused is None else self._paused
        names, points = self._curves.shown()
        return {
            "step": self.step,
            "names": names,
            "points": points,
            "elapsed": now - self._began,
            "tokens": self.tokens,
            "speed": self._speed(now),
        }

    def _speed(self, now: float) -> float | None:
        """Tokens per second of the last steps; None while there are too few."""
        last = [(when, count) for when, count in self._noted if when > now - SPEED_SECONDS]
        last = last if len(last) > 1 else list(self._noted)[-2:]
        tokens = sum(count for _, count in last[1:])
        return tokens / (last[-1][0] - last[0][0]) if tokens else None
