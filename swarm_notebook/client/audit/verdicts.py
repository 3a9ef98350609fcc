"""What audits have found. Pure code."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from swarm_notebook.client.audit.comparison import Errors
from swarm_notebook.client.audit.interface import Outcomes
from swarm_notebook.client.audit.piece import Piece

AGREED, WRONG, OPEN = "agreed", "wrong", "open"
SIGNED = "what was signed"
# Verdicts that are kept, the latest; those of wrong answers are kept apart, with what they are of.
MAX_VERDICTS, MAX_PROOFS = 1024, 64


@dataclass(frozen=True)
class Verdict:
    """One audit.

    Attributes:
        peer, name: the server that was audited.
        start, end: its blocks ``[start, end)`` that were.
        tokens: how many were compared.
        outcome: `AGREED`, `WRONG` (its answer), or `OPEN`: nobody could decide.
        by: whoever replayed it.
        why: what is wrong, or why it is open.
        errors: of the answer against the last replay; None if there was none.
        when: in seconds of Unix time.
        proof: the piece, if its answer is wrong.
        back: it was a backward pass: its gradients.
        made: when the server answered, in seconds of Unix time.
    """

    peer: str
    name: str
    start: int
    end: int
    tokens: int
    outcome: str
    by: tuple[str, ...] = ()
    why: str = ""
    errors: Errors | None = None
    when: float = field(default_factory=time.time)
    proof: Piece | None = None
    back: bool = False
    made: float = 0.0


class Verdicts:
    """The latest verdicts, and how many there were of each server."""

    def __init__(self) -> None:
        self._all: list[Verdict] = []
        self.proofs: list[Verdict] = []
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, verdict: Verdict) -> None:
        """Keep a verdict."""
        self._all.append(verdict)
        del self._all[:-MAX_VERDICTS]
        if verdict.proof is not None and len(self.proofs) < MAX_PROOFS:
            self.proofs.append(verdict)
        self._counts[verdict.peer][verdict.outcome] += 1

    def outcomes(self, peer: str) -> Outcomes:
        """How all audits of a server ended; may be called from any thread."""
        counts = self._counts.get(peer, Counter())
        return Outcomes(counts[AGREED], counts[WRONG], counts[OPEN])

    def all(self) -> tuple[Verdict, ...]:
        """The latest verdicts, the oldest first; may be called from any thread."""
        return tuple(self._all)
