"""How fast a text was written, and whose time it took. Pure: the clock is handed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Timing:
    """One run of ``generate``. Times are seconds, on a clock that only goes forward.

    Attributes:
        began: when it was asked for.
        computed: tokens that had to be read before the first one could be written; the rest of
            the prompt was known from before.
        first: when the first token came, or None.
        last: when the latest token came, or None.
        tokens: how many came.
        servers: seconds that each server took, from sending to its answer, by its name.
        lost: servers that were lost meanwhile and replaced.
    """

    began: float
    computed: int = 0
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    servers: dict[str, float] = field(default_factory=dict)
    lost: int = 0

    def token(self, now: float) -> None:
        """Count a token that has just come."""
        self.first = now if self.first is None else self.first
        self.last = now
        self.tokens += 1

    def passed(self, servers: Mapping[str, float]) -> None:
        """Count what the servers took in one pass."""
        for name, seconds in servers.items():
            self.servers[name] = self.servers.get(name, 0.0) + seconds

    @property
    def to_first(self) -> float | None:
        """Seconds to the first token."""
        return None if self.first is None else self.first - self.began

    @property
    def per_second(self) -> float | None:
        """Tokens per second after the first."""
        if self.first is None or self.last is None or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)

    @property
    def shares(self) -> dict[str, float]:
        """The part of the time that each server took, 0 to 1; what is missing passed here."""
        if self.last is None or self.last <= self.began:
            return {}
        whole = self.last - self.began
        return {name: min(seconds / whole, 1.0) for name, seconds in self.servers.items()}
