"""What notebooks tell of themselves, which faults there were, and what these cost."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

AFTER_SECONDS = 4.0


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Fault(NamedTuple):
    """One fault, and when it began and ended on the monotonic clock."""

    kind: str
    began: float
    ended: float


@dataclass
class Told:
    """Beats by kind of work, counts, errors, faults; several threads write at once.

    Attributes:
        unclear: errors that are none of ours, or say next to nothing.
    """

    beats: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, lines: Iterable[str]) -> None:
        """Thread: until the notebook ends."""
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                self._take(json.loads(line))

    def _take(self, fact: dict[str, Any]) -> None:
        with self.lock:
            if "beat" in fact:
                self.beats[fact["beat"]].append(fact["at"])
            if "error" in fact:
                self.errors.append(fact["error"])
                if not fact["clear"]:
                    self.unclear.append(fact["error"])
            self.counts.update(fact.get("counts", {}))

    def end(self) -> None:
        """The notebook is about to end; a work that has stopped before is a pause until now."""
        with self.lock:
            for beats in self.beats.values():
                beats.append(time.monotonic())

    def pause(self, fault: Fault) -> float:
        """The longest time without a beat around a fault, in seconds."""
        longest, until = 0.0, fault.ended + AFTER_SECONDS
        sleeps = [other for other in self.faults if other.kind == "sleep"]
        for beats in self.beats.values():
            for before, after in itertools.pairwise(beats):
                if after > fault.began and before < until:
                    slept = sum(
                        max(0.0, min(after, one.ended) - max(before, one.began)) for one in sleeps
                    )
                    longest = max(longest, after - before - slept)
        return longest

    def table(self) -> str:
        """What happened, and what it cost."""
        pauses: dict[str, list[float]] = defaultdict(list)
        for fault in self.faults:
            pauses[fault.kind].append(self.pause(fault))
        every = [pause for found in pauses.values() for pause in found] or [0.0]
        rows = ["fault              times   median    worst"]
        for kind, found in [*sorted(pauses.items()), ("all", every)]:
            median, worst = statistics.median(found), max(found)
            rows.append(f"{kind:<17} {len(found):>6} {median:>6.1f} s {worst:>6.1f} s")
        counts = self.counts
        rows.append(
            f"{counts['tokens']} tokens, {counts['wrong']} wrong; {counts['steps']} steps, "
            f"{counts['lost']} lost; {len(self.errors)} errors, {len(self.unclear)} of them "
            "without a clear text"
        )
        others = sorted(set(counts) - {"tokens", "wrong", "steps", "lost"})
        rows.append(", ".join(f"{counts[name]} {name}" for name in others))
        return "\n".join(rows)
