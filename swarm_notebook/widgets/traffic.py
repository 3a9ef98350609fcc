"""What the map shows of the tokens that pass: the route, the speed, and servers that were lost.

Pure code: it is fed the events of `Swarm.events` and says what a view needs, as compact lists.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from swarm_notebook.client.telemetry import Event, Failover, PassRecord, StepRecord
from swarm_notebook.report.formatting import runs

# Speed is of the last few seconds, or it would show what was; failovers are a list for the eye.
SPEED_SECONDS = 3.0
MAX_FAILOVERS = 20


@dataclass
class LostServer:
    """A server that was lost, and who went on in its place.

    Attributes:
        when: seconds of Unix time.
        left: blocks that nobody has computed since.
        taken: names of those who did, in the order of their answers.
        seconds: from the loss until the last of the blocks was computed elsewhere; None before.
    """

    failover: Failover
    when: float
    left: set[int]
    taken: list[str] = field(default_factory=list)
    seconds: float | None = None


class NotebookTraffic:
    """The traffic of one notebook, as far as its events were taken in.

    Attributes:
        route: who computed the latest pass, as ``(peer, start, end)`` in the order of the blocks.
        losses: the servers lost last.
        tokens: tokens times sequences that have passed, with those before the first event.
    """

    tokens: int

    def __init__(self, tokens: int = 0) -> None:
        self._peers: dict[int, str] = {}
        self.losses: deque[LostServer] = deque(maxlen=MAX_FAILOVERS)
        self.tokens = tokens
        self._recent: deque[StepRecord | PassRecord] = deque(maxlen=256)

    @property
    def route(self) -> list[tuple[str, int, int]]:
        peers = [self._peers.get(block) for block in range(max(self._peers, default=-1) + 1)]
        return [(peer, start, end) for start, end, peer in runs(peers) if peer is not None]

    def take(self, events: Iterable[Event]) -> None:
        """Take in what has happened."""
        for event in events:
            if isinstance(event, Failover):
                when = event.when + time.time() - time.perf_counter()
                self.losses.append(LostServer(event, when, set(range(event.start, event.end))))
            else:
                self._pass(event)

    def speed(self, now: float | None = None) -> tuple[float, float]:
        """Tokens per second in the last seconds, and seconds per pass; zeros if none passed.

        Args:
            now: of `time.perf_counter`.
        """
        now = time.perf_counter() if now is None else now
        recent = [step for step in self._recent if now - step.ended < SPEED_SECONDS]
        if not recent:
            return 0.0, 0.0
        span = max(now - recent[0].began, 1e-3)
        whole = [step for step in recent if step.first]
        tokens = sum(step.tokens * step.rows for step in whole)
        return tokens / span, sum(step.ended - step.began for step in recent) / max(len(whole), 1)

    def failovers(self) -> list[list[Any]]:
        """The losses for the view: when, peer, name, blocks, reason, successors, seconds."""
        return [
            [
                round(loss.when, 1),
                loss.failover.peer,
                loss.failover.name,
                loss.failover.start,
                loss.failover.end,
                loss.failover.reason,
                loss.taken,
                loss.seconds and round(loss.seconds, 2),
            ]
            for loss in self.losses
        ]

    def _pass(self, step: StepRecord | PassRecord) -> None:
        if step.first:
            self.tokens += step.tokens * step.rows
            self._peers.clear()
        self._recent.append(step)
        for hop in step.hops:
            self._peers |= dict.fromkeys(range(hop.start, hop.end), hop.peer)
        for loss in self.losses:
            if loss.left:
                _mend(loss, step)


def _mend(loss: LostServer, step: StepRecord | PassRecord) -> None:
    """Note who computed a lost server's blocks after it."""
    for hop in step.hops:
        mended = loss.left & set(range(hop.start, hop.end))
        if mended:
            loss.left -= mended
            if hop.name not in loss.taken:
                loss.taken.append(hop.name)
    if not loss.left:
        loss.seconds = max(step.ended - loss.failover.when, 0.0)
