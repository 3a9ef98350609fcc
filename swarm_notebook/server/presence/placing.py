"""What a server reads of its swarm to choose its blocks.

Records of servers that have died stay for a minute or two, so whoever chooses asks each server for
a sign of life, and reckons with those alone that answer.
"""

from __future__ import annotations

import asyncio
import logging
import random
import statistics
import time
from collections.abc import Callable

from swarm_notebook.net.dht.records import (
    ServerInfo,
    ServerSpan,
    ServerState,
    announcements,
    spans_of,
)
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire import protocol
from swarm_notebook.server.presence.flow import Moves, Place, held
from swarm_notebook.server.presence.places import better, choose

logger: logging.Logger = logging.getLogger(__name__)

# Between two looks at the swarm, on average: one and a half of them and a random wait are half a
# minute, and reading all records costs what a notebook does, which reads them every ten seconds.
LOOK_SECONDS = 12.0
# The part of that where some block has no server: a swarm with a hole serves nobody.
HURRY = 0.25
# Between two signs of life that are asked for, of so many others: a ping takes a server 0.4 ms.
WATCH_SECONDS, WATCHED = 3.0, 16
# Until a notebook has read of a server that is new: every ten seconds it does
# (`client.servers.directory.REFRESH_PERIOD`), and to read takes a moment.
NEWS_SECONDS = 13.0


class Placing:
    """One server's view of the places in its swarm.

    Args:
        node: the server's.
        prefix: the model's name in the DHT.
        blocks: how many it has.

    Attributes:
        silent: who was announced at the last look and gave no sign of life.
    """

    def __init__(self, node: Node, prefix: str, blocks: int) -> None:
        self._node, self._prefix, self._blocks = node, prefix, blocks
        self.silent: set[str] = set()
        # Who had which blocks at the last look.
        self._known: list[tuple[str, Place]] = []

    async def choose(self, size: int) -> tuple[int, int]:
        """The span of ``size`` blocks to begin with.

        Who has not loaded a block has not measured itself, and takes itself for as fast as others:
        over 30 moments of joins and leaves swarms were as fast, and moved as often, as with its own
        rate.
        """
        others, _ = await self._others(1.0)
        through_one = [place.rate * (place.end - place.start) for place in others]
        rate = statistics.median(through_one or [1.0]) / size
        return await asyncio.to_thread(choose, others, self._blocks, size, rate)

    async def better(self, own: Callable[[], Place]) -> tuple[Place, bool]:
        """Return as soon as another place is better, and stays so for a random while.

        Args:
            own: where the server is, and how it moves just then.

        Returns:
            that place, and whether each block has a server.
        """
        seconds = LOOK_SECONDS
        while True:
            try:
                await self._wait(seconds * (0.5 + random.random()), own())  # noqa: S311 - no secret
                place, whole = await self._wanted(own())
                seconds = LOOK_SECONDS if whole else HURRY * LOOK_SECONDS
                # Others see the same: when one has gone, it is not better any more for the rest.
                if place is not None:
                    await asyncio.sleep(seconds * random.random())  # noqa: S311
                    place, whole = await self._wanted(own())
                    if place is not None:
                        return place, whole
            except Exception:
                logger.exception("looking for a better place failed; trying again")
                await asyncio.sleep(HURRY * LOOK_SECONDS)

    async def _wait(self, seconds: float, own: Place) -> None:
        """Wait so long, or until some block has lost its last server."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, WATCH_SECONDS))
            watched = random.sample(self._known, min(len(self._known), WATCHED))
            pings = await asyncio.gather(*(self._node.ping(peer) for peer, _ in watched))
            silent = {peer for (peer, _), ping in zip(watched, pings, strict=True) if ping is None}
            there = [place for peer, place in self._known if peer not in silent]
            if silent and not all(held([own, *there], self._blocks)):
                return

    async def replaced(self, start: int, end: int) -> None:
        """Return when each of these blocks has another server that notebooks know of."""
        since: float | None = None
        while since is None or time.monotonic() - since < NEWS_SECONDS:
            try:
                _, serving = await self._others(1.0)
                replaced = all(held(serving, self._blocks)[start:end])
                since = (since or time.monotonic()) if replaced else None
            except Exception:
                logger.exception("looking for servers of the same blocks failed; trying again")
            await asyncio.sleep(LOOK_SECONDS / 4)

    async def _wanted(self, own: Place) -> tuple[Place | None, bool]:
        """Where a server had better be, and whether each block has one, be it one that loads."""
        others, serving = await self._others(own.rate)
        counts, now = held(others, self._blocks), held(serving, self._blocks)
        whole = all(held([*others, own], self._blocks))
        span = await asyncio.to_thread(better, others, self._blocks, own)
        if span is None:
            return None, whole
        kept = range(*span) if own.moves is Moves.BESIDE else range(0)
        left = [block for block in range(own.start, own.end) if block not in kept]
        # Whoever will have these blocks still loads them.
        loading = any(counts[block] and not now[block] for block in left)
        return None if loading else own.at(span[0]), whole

    async def _others(self, rate: float) -> tuple[list[Place], list[Place]]:
        """The servers besides this one that live, and those of them that serve already.

        Args:
            rate: of those that do not say how fast they are.
        """
        spans = await self._spans()
        peers = {span.peer for span in spans}
        pings = await asyncio.gather(*(self._node.ping(peer) for peer in peers))
        alive = {peer for peer, ping in zip(peers, pings, strict=True) if ping is not None}
        self.silent = peers - alive
        found = [
            (
                span.peer,
                Place.announced(span.start, span.end, span.info.throughput, _moves(span.info))
                if span.info.throughput
                else Place(span.start, span.end, rate, _moves(span.info)),
                span.info.state == ServerState.ONLINE,
            )
            for span in spans
            if span.peer in alive
        ]
        self._known = [(peer, place) for peer, place, _ in found]
        return [place for _, place, _ in found], [place for _, place, serves in found if serves]

    async def _spans(self) -> list[ServerSpan]:
        uids = [protocol.block_uid(self._prefix, block) for block in range(self._blocks)]
        found = await self._node.dht.get_many(uids, sufficient_expiration_time=float("inf"))
        own = self._node.peer_id.to_base58()
        holders = {
            block: {
                one.peer: one.info
                for one in announcements(found[uid], self._prefix, self._node.membership)
                if one.peer != own and one.info.state != ServerState.OFFLINE
            }
            for block, uid in enumerate(uids)
        }
        return spans_of(holders)


def _moves(info: ServerInfo) -> Moves:
    """How a server moves, as it announces; Petals' do by a rule of their own."""
    told = info.moves or 0
    return Moves(told) if 0 <= told <= max(Moves) else Moves.NEVER
