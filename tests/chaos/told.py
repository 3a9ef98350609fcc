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
LONGEST, ALONE = 10, "alone"


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Fault(NamedTuple):
    """One fault, and when it began and ended on the monotonic clock.

    Attributes:
        where: whom it befell.
        covered: whether another server had the blocks.
    """

    kind: str
    began: float
    ended: float
    where: str = "the notebook"
    covered: bool = True


@dataclass
class Told:
    """Beats by kind of work, counts, errors, faults; several threads write at once.

    Attributes:
        unclear: errors that are none of ours, or say next to nothing.
        quiet: from when to when there was no fault.
    """

    beats: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    quiet: tuple[float, float] = 0.0, 0.0
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

    def pauses(self) -> dict[Fault, float]:
        """The longest time without a beat that each fault may have caused, in seconds.

        A pause is of the faults that began in it, of each of them; if there is none, of the last
        one that began before it, unless that was over for more than `AFTER_SECONDS`.
        """
        faults = sorted(self.faults, key=lambda fault: fault.began)
        sleeps = [fault for fault in faults if fault.kind == "sleep"]
        longest = dict.fromkeys(faults, 0.0)
        for beats in self.beats.values():
            for before, after in itertools.pairwise(beats):
                slept = sum(
                    max(0.0, min(after, one.ended) - max(before, one.began)) for one in sleeps
                )
                causes = [fault for fault in faults if before <= fault.began < after]
                earlier = [fault for fault in faults if fault.began < before]
                if not causes and earlier and earlier[-1].ended + AFTER_SECONDS > before:
                    causes = earlier[-1:]
                for fault in causes:
                    longest[fault] = max(longest[fault], after - before - slept)
        return longest

    def usual(self) -> list[float]:
        """The times between two beats of the slowest work while there was no fault, in seconds."""
        (began, ended), found = self.quiet, list[list[float]]()
        for beats in self.beats.values():
            pairs = itertools.pairwise(beats)
            found.append([after - before for before, after in pairs if began < before < ended])
        return max((one for one in found if one), key=statistics.median, default=[])

    def table(self) -> str:
        """What happened, and what it cost; first the longest pauses, one by one."""
        every = self.pauses()
        begun = min((fault.began for fault in every), default=0.0)
        rows = [
            f"{pause:>4.1f} s: {fault.kind} of {fault.where} at {fault.began - begun:.1f} s, for "
            f"{fault.ended - fault.began:.1f} s"
            for fault, pause in sorted(every.items(), key=lambda one: -one[1])[:LONGEST]
        ]
        pauses: dict[str, list[float]] = defaultdict(list)
        for fault, pause in every.items():
            pauses[fault.kind if fault.covered else ALONE].append(pause)
        alone = pauses.pop(ALONE, [])
        covered = [pause for found in pauses.values() for pause in found]
        rows.append("fault              times   median    worst")
        ends = [("all of these", covered), ("no other server", alone), ("no fault", self.usual())]
        for kind, found in [*sorted(pauses.items()), *ends]:
            median, worst = statistics.median(found or [0.0]), max(found, default=0.0)
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
