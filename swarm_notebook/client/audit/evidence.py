"""What audits of one server say together, where each alone cannot tell. Pure code.

Rounding that goes both ways averages out over tokens; a lie does not. So the errors of a server's
latest audits are added up, and held to the limit for so many tokens (`limits.max_ratio`).

Audits by different witnesses are not mixed: a single one could otherwise spoil the evidence on a
server that is honest. A sum that is over its limit is a *doubt*; it counts once somebody else, or
the notebook itself, has come to the same.

What was audited last is kept, and the rest forgotten: a notebook meets servers without end.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from swarm_notebook.client.audit import limits
from swarm_notebook.client.audit.comparison import Errors

# Sums that are kept, each of up to 65 audits of 32 tokens: 10 MB at most.
MOST_SUMS = 512


@dataclass
class _Sum:
    """The latest audits of a server by the same witness: `limits.MOST_TOKENS`, and a piece more."""

    audits: deque[Errors] = field(default_factory=deque)
    tokens: int = 0

    def add(self, errors: Errors) -> None:
        self.audits.append(errors)
        self.tokens += errors.tokens
        while self.tokens - self.audits[0].tokens >= limits.MOST_TOKENS:
            self.tokens -= self.audits.popleft().tokens

    def why(self) -> str:
        """The first limit that the latest audits, more and more of them, are over.

        A few tokens that are far off in none of them by itself are, together.
        """
        together = Errors()
        for errors in reversed(self.audits):
            together += errors
            if together.ratio is not None and together.ratio > limits.max_ratio(together.tokens):
                return (
                    f"over {together.tokens} tokens of several audits, error over that of its "
                    f"dtype {together.ratio:.3g}, honest servers reach "
                    f"{limits.max_ratio(together.tokens):.3g}"
                )
            if together.outliers > 1 + limits.max_outliers(together.tokens):
                return (
                    f"over {together.tokens} tokens of several audits, {together.outliers} are far "
                    "from what their dtype makes there"
                )
        return ""


class Evidence:
    """Adds up the audits of each server in halves; those of float32 need no second one."""

    def __init__(self) -> None:
        self._sums: OrderedDict[tuple[str, frozenset[str]], _Sum] = OrderedDict()
        self._doubts: dict[str, set[frozenset[str]]] = {}

    def add(self, peer: str, by: frozenset[str], errors: Errors) -> str:
        """Take an audit that found nothing by itself; says what it makes too much of, if it does.

        Args:
            peer: that was audited.
            by: the peers that replayed it; empty for the notebook.
            errors: those found.
        """
        if errors.ratio is None:
            return ""
        key = peer, by
        found = self._sums.setdefault(key, _Sum())
        self._sums.move_to_end(key)
        if len(self._sums) > MOST_SUMS:
            self._drop(next(iter(self._sums)))
        found.add(errors)
        why = found.why()
        if why:
            self._doubts.setdefault(peer, set()).add(by)
        return why

    def _drop(self, key: tuple[str, frozenset[str]]) -> None:
        """Forget a sum, and the doubt that came of it."""
        peer, by = key
        del self._sums[key]
        doubts = self._doubts.get(peer, set())
        doubts.discard(by)
        if not doubts:
            self._doubts.pop(peer, None)

    def counts(self, peer: str) -> bool:
        """Whether the doubts about a server are more than the word of one witness."""
        doubts = self._doubts.get(peer, set())
        return frozenset() in doubts or any(not a & b for a in doubts for b in doubts if a != b)

    def doubters(self, peer: str) -> set[str]:
        """Witnesses that have said all they can about a server."""
        return set().union(*self._doubts.get(peer, set()))

    def forget(self, peer: str) -> None:
        """It is known why: begin anew with this server."""
        self._doubts.pop(peer, None)
        for key in [key for key in self._sums if key[0] == peer]:
            del self._sums[key]
