"""How busy servers are for others, and how notebooks that know the same choose differently.

Servers tell with every ping how many requests they have answered. What is not this notebook's own
is others'. Those that know the same, or nothing yet, would all take the same of several servers
that are alike. So servers number their notebooks as they come, and each takes its place in a
sequence that fills a line evenly, however far it has got: of two, three or more equal servers each
is taken by nearly as many. (By turns would not do: who connects may ask as two peers, one after the
other.) What a notebook makes of both is decided in `kept`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

# Servers of equal machines announce rates that differ by so much: with six runs of a tenth of a
# second on two cores, nine in ten are within it of each other.
ALIKE = 0.1
# Two pings that are closer than that say little of a rate.
LEAST_SECONDS = 1.0
# Its multiples, but for what is before the point, lie as evenly as any (the golden ratio).
GOLDEN = (5**0.5 - 1) / 2


@dataclass
class _Told:
    """Requests answered for others until `when` (by `time.monotonic`), and their rate then."""

    requests: int
    when: float
    rate: float = 0.0


@dataclass
class Crowd:
    """What one notebook knows of the work of servers for others.

    Attributes:
        own: this notebook's peer id.
    """

    own: str
    _told: dict[str, _Told] = field(default_factory=dict)
    _arrivals: dict[str, int] = field(default_factory=dict)

    def arrived(self, peer: str, number: object) -> None:
        """A server has said how many came before this notebook; anything at all may come."""
        if isinstance(number, int) and 0 <= number < 1 << 31:
            self._arrivals[peer] = number

    def told(self, peer: str, answered: object, here: int, when: float) -> None:
        """A server has said how much it has done.

        Args:
            answered: requests since it started, as it says; anything at all may come.
            here: those of them that were this notebook's.
            when: by `time.monotonic`.
        """
        if not isinstance(answered, int) or not 0 <= answered < 1 << 62:
            return
        others = answered - here
        before = self._told.get(peer)
        if before is None or others < before.requests:  # it has started again
            self._told[peer] = _Told(others, when)
        elif when - before.when >= LEAST_SECONDS:
            rate = (others - before.requests) / (when - before.when)
            self._told[peer] = _Told(others, when, rate)

    def rate(self, peer: str) -> float:
        """Requests of others per second that a server has answered lately."""
        known = self._told.get(peer)
        return 0.0 if known is None else known.rate

    def one_of(self, peers: Sequence[str]) -> str:
        """Of servers that are alike this notebook's, in an order that is the same for all."""
        number = self._arrivals.get(min(peers))
        hashed = zlib.crc32(self.own.encode()) / (1 << 32)  # Petals' servers tell no number
        place = hashed if number is None else number * GOLDEN % 1
        return peers[int(place * len(peers))]

    def forget(self, peer: str) -> None:
        self._told.pop(peer, None)
        self._arrivals.pop(peer, None)
