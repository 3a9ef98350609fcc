"""How peers have behaved, and who is avoided for it.

A failed peer is avoided at once and for a time that doubles with each failure in a row; an answered
request forgives, and so does an answered ping after the first few failures, or after one that was
not answered: the server has come back. Where nobody else has the blocks, it is tried once as soon
as it answers, however often it has failed, as a ban may be longer than patience. A peer that does
not answer a ping is avoided until it answers one. Two that fail to hand hidden states from one to
the other are kept apart for a while. One whose answers were found wrong is left for good.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

# A few seconds, twice as long each time, up to a minute: Petals' clients back off likewise.
BAN_SECONDS = 3.0
BAN_SECONDS_MAX = 60.0
# After so many in a row, an answered ping says little: it pings well and works badly.
FORGIVABLE_FAILURES = 3
# A failed push costs seconds (the servers' `PUSH_SECONDS`), the detour over the notebook only
# milliseconds: a push is tried again once in a minute.
APART_SECONDS = 60.0


# Why a peer is avoided, in a word or two: it gives no sign of life; it answers and fails; an audit
# found its answers wrong; it has other weights than the notebook.
UNREACHABLE, FAILING, WRONG, OTHER = "unreachable", "failing", "found wrong", "other checkpoint"


@dataclass(frozen=True)
class Fault:
    """Why a peer is avoided.

    Attributes:
        kind: `UNREACHABLE`, `FAILING`, `WRONG` or `OTHER`.
        reason: what happened.
        retry: when it is tried again, by `time.monotonic`; None if never.
    """

    kind: str
    reason: str
    retry: float | None = None


@dataclass
class _Health:
    """Failures in a row, until when the peer is avoided, and why.

    Attributes:
        gone: in the latest it gave no sign of life.
        tried: it was used in spite of its failures, as nobody else had its blocks.
    """

    failures: int = 0
    until: float = 0.0
    reason: str = ""
    gone: bool = False
    tried: bool = False


class PeerHealth:
    """How all peers that one notebook knows have behaved.

    Attributes:
        wrong: peers whose answers were found wrong, and why; nothing makes that good.
    """

    def __init__(self) -> None:
        self._failing: dict[str, _Health] = {}
        # What it answered to the last ping instead of a sign of life, by peer; empty for nothing.
        self._silent: dict[str, str] = {}
        self._apart: dict[tuple[str, str], float] = {}
        self.wrong: dict[str, str] = {}

    def failed(self, peer: str, reason: str, *, gone: bool = False) -> None:
        """A request to the peer failed; it is ``gone`` if it gave no sign of life."""
        health = self._failing.setdefault(peer, _Health())
        seconds = min(BAN_SECONDS * 2**health.failures, BAN_SECONDS_MAX)
        health.failures += 1
        health.until, health.reason, health.gone = time.monotonic() + seconds, reason, gone

    def succeeded(self, peer: str) -> None:
        self._failing.pop(peer, None)

    def answered(self, peer: str) -> None:
        """The peer has answered a ping."""
        if peer in self._silent:  # it was away and is back: its failures were those of its absence
            del self._silent[peer]
            self._failing.pop(peer, None)
        health = self._failing.get(peer)
        if health is not None and health.failures <= FORGIVABLE_FAILURES:
            health.until = 0.0

    def give_chance(self, peer: str) -> bool:
        """Use a peer that answers pings in spite of its failures.

        Once only, and again when it has been away: a call to one that answers pings and nothing
        else is to end.

        Returns:
            whether it is avoided no longer.
        """
        health = self._failing.get(peer)
        if health is None or health.tried or peer in self._silent or peer in self.wrong:
            return False
        health.until, health.tried = 0.0, True
        return True

    def silent(self, peer: str, said: str = "") -> None:
        """The peer has not answered a ping, or with something else: what it ``said``."""
        self._silent[peer] = said
        if peer in self._failing:
            self._failing[peer].tried = False

    def is_silent(self, peer: str) -> bool:
        """Whether nothing came back to the last ping."""
        return self._silent.get(peer) == ""

    def fault(self, peer: str, pinged: float) -> Fault | None:
        """Why a peer is avoided just now; None if it is not.

        Args:
            pinged: when it is pinged next, by `time.monotonic`.
        """
        if peer in self.wrong:
            return Fault(WRONG, self.wrong[peer])
        health = self._failing.get(peer)
        banned = health is not None and health.until > time.monotonic()
        if peer in self._silent:
            said = self._silent[peer]
            failed = health.reason if health is not None and banned else ""
            kind = FAILING if said else UNREACHABLE
            return Fault(kind, failed or said or "it does not answer", pinged)
        if health is None or not banned:
            return None
        forgivable = health.failures <= FORGIVABLE_FAILURES
        retry = min(health.until, pinged) if forgivable else health.until
        return Fault(UNREACHABLE if health.gone else FAILING, health.reason, retry)

    def keep_apart(self, sender: str, receiver: str, seconds: float = APART_SECONDS) -> None:
        """For a while, let no hidden states go from one of these servers to the other."""
        self._apart[sender, receiver] = time.monotonic() + seconds

    def kept_apart(self, sender: str, receiver: str) -> bool:
        until = self._apart.get((sender, receiver))
        return until is not None and until >= time.monotonic()

    def forget(self, peer: str) -> None:
        """The peer is gone for good."""
        self._failing.pop(peer, None)
        self._silent.pop(peer, None)
        for pair in [pair for pair in self._apart if peer in pair]:
            del self._apart[pair]
