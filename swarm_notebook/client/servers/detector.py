"""Whether a server is there: a failure detector that learns how soon each one answers.

A ping is missed as TCP misses a segment (RFC 6298): after the smoothed round trip and four times
its mean deviation. An answer that is too late makes the next silence be borne for about twice
as long (as TCP doubles its timer: the server may be slow, or was away just once), and some prompt
ones undo that. So far and busy servers are given their time, and near ones are missed soon. Whoever
is missed wrongly is believed again as soon as its answer comes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Of RFC 6298: weights of the newest round trip in the mean and in the deviation, and how many
# deviations are borne.
_NEWEST, _NEWEST_DEVIATION, _DEVIATIONS = 1 / 8, 1 / 4, 4
# What a late answer counts at most, by what was borne: then about twice as much is borne.
_LATE = 1.5
# The least that is borne: more than the longest of seventy pings of servers that ran, on two cores
# at load 11 (0.22 s; the median was 0.012 s).
LEAST_SECONDS = 0.3
# A timer that is so late says that this process was held up, or slept: whoever was asked could not
# be heard. A process that is held up again and again waits so often and no longer.
HELD_UP, MOST_WAITS = 0.25, 3
# Between two questions to one peer: many requests of one server are watched at once.
_LATELY = 0.25
# How often it is looked what is borne by now.
_SLICE = 0.1
# Between two questions to one that was missed: a call that needs it finds it back, or gone.
_RETURN_PERIOD = 1.0
# Peers that are asked so; each costs a message of a hundred bytes a second.
_MAX_MISSED = 16


async def is_done(task: asyncio.Future[Any], seconds: float) -> bool:
    """Whether a task ends within so many seconds, in which this process was not held up."""
    for _ in range(MOST_WAITS):
        began = time.monotonic()
        await asyncio.wait({task}, timeout=seconds)
        if task.done() or time.monotonic() - began < seconds + HELD_UP:
            break
    return task.done()


@dataclass(slots=True)
class _RoundTrips:
    """Of one peer, in seconds."""

    mean: float
    deviation: float

    @property
    def borne(self) -> float:
        return max(LEAST_SECONDS, self.mean + _DEVIATIONS * self.deviation)


class FailureDetector:
    """Pings of all peers that one notebook knows; belongs to its loop.

    Args:
        ping: asks a peer for a sign of life, with a limit of its own; whether one came.
    """

    def __init__(self, ping: Callable[[str], Awaitable[bool]]):
        self._ping = ping
        self._by_peer: dict[str, _RoundTrips] = {}
        self._asked: dict[str, asyncio.Task[bool]] = {}
        self._heard: dict[str, float] = {}  # when each answered last

    def answered(self, peer: str, seconds: float) -> None:
        """A ping was answered after so long."""
        self._heard[peer] = time.monotonic()
        known = self._by_peer.get(peer)
        if known is None:
            self._by_peer[peer] = _RoundTrips(seconds, seconds / 2)
            return
        seconds = min(seconds, _LATE * known.borne)
        known.deviation += _NEWEST_DEVIATION * (abs(seconds - known.mean) - known.deviation)
        known.mean += _NEWEST * (seconds - known.mean)

    def borne(self, peer: str) -> float | None:
        """Seconds after which an answer is more than late; None for a peer that never answered."""
        known = self._by_peer.get(peer)
        return None if known is None else known.borne

    async def is_there(self, peer: str, borne: Callable[[], float]) -> bool:
        """Whether a peer gives a sign of life before its silence is borne no longer.

        Those who ask at the same time share a ping; it goes on when they wait no longer.

        Args:
            borne: for how many seconds it is, which is asked again and again: others may have come
                that have the peer's blocks.
        """
        lately = self._heard.get(peer, -_LATELY) + _LATELY - time.monotonic()
        if lately > 0:
            await asyncio.sleep(lately)
        asked, waited = self._begin(peer), 0.0
        while (left := borne() - waited) > 0:
            seconds = min(left, _SLICE)
            if await is_done(asked, seconds):
                return asked.result()
            waited += seconds
        return False

    async def keep_asking(self, missed: Callable[[], Sequence[str]]) -> None:
        """For ever: ask those that are missed whether they are back."""
        while True:
            await asyncio.sleep(_RETURN_PERIOD)
            for peer in missed()[:_MAX_MISSED]:
                self._begin(peer)

    def _begin(self, peer: str) -> asyncio.Task[bool]:
        asked = self._asked.get(peer)
        if asked is None:
            asked = self._asked[peer] = asyncio.create_task(self._ask(peer))
        return asked

    async def _ask(self, peer: str) -> bool:
        try:
            return await self._ping(peer)
        finally:
            del self._asked[peer]

    def forget(self, peer: str) -> None:
        """The peer is gone for good."""
        self._by_peer.pop(peer, None)
        self._heard.pop(peer, None)

    def stop(self) -> None:
        """Ask nobody any more."""
        for asked in self._asked.values():
            asked.cancel()
