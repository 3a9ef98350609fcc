"""How peers have behaved, and who is avoided for it.

A failed peer is avoided at once and for a time that doubles with each failure in a row; an answered
request forgives, and so does an answered ping after the first few failures: the server has come
back. A peer that does not answer a ping is avoided until it answers one. Two that fail to hand
hidden states from one to the other are kept apart for a while.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

BAN_SECONDS = 3.0
BAN_SECONDS_MAX = 60.0
FORGIVABLE_FAILURES = 3
APART_SECONDS = 60.0


@dataclass
class _Health:
    """Failures in a row, until when the peer is avoided, and why."""

    failures: int = 0
    until: float = 0.0
    reason: str = ""


class PeerHealth:
    """The standing of all peers that one notebook knows."""

    def __init__(self) -> None:
        self._standing: dict[str, _Health] = {}
        self._silent: set[str] = set()
        self._apart: dict[tuple[str, str], float] = {}

    def failed(self, peer: str, reason: str) -> None:
        """A request to the peer failed."""
        standing = self._standing.setdefault(peer, _Health())
        seconds = min(BAN_SECONDS * 2**standing.failures, BAN_SECONDS_MAX)
        standing.failures += 1
        standing.until, standing.reason = time.monotonic() + seconds, reason

    def succeeded(self, peer: str) -> None:
        """The peer has answered a request."""
        if peer in self._standing:
            del self._standing[peer]

    def answered(self, peer: str) -> None:
        """The peer has answered a ping."""
        self._silent.discard(peer)
        standing = self._standing.get(peer)
        if standing is not None and standing.failures <= FORGIVABLE_FAILURES:
            standing.until = 0.0

    def silent(self, peer: str) -> None:
        """The peer has not answered a ping."""
        self._silent.add(peer)

    def avoided(self, peer: str) -> str:
        """Why a peer is avoided just now; an empty text if it is not."""
        standing = self._standing.get(peer)
        if standing is not None and standing.until > time.monotonic():
            return standing.reason
        return "it does not answer" if peer in self._silent else ""

    def keep_apart(self, sender: str, receiver: str) -> None:
        """For a while, let no hidden states go from one of these servers to the other."""
        self._apart[sender, receiver] = time.monotonic() + APART_SECONDS

    def kept_apart(self, sender: str, receiver: str) -> bool:
        """Whether they are kept apart just now."""
        until = self._apart.get((sender, receiver))
        return until is not None and until >= time.monotonic()
