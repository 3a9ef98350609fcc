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
# Until a notebook has read of a server that is new: every ten seconds it does
# (`client.servers.directory.REFRESH_PERIOD`), and to read takes a moment.
NEWS_SECONDS = 13.0


class Placing:
    """One server's view of the places in its swarm.

    Args:
        node: the server's.
        prefix: the model's name in the DHT.
        blocks: how many it has.
    """

    def __init__(self, node: Node, prefix: str, blocks: int) -> None:
        self._node, self._prefix, self._blocks = node, prefix, blocks

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

    async def better(self, own: Callable[[], Place]) -> Place:
        """Return as soon as another place is better, and stays so for a random while.

        Args:
            own: where the server is, and how it moves just then.
        """
        while True:
            await asyncio.sleep(LOOK_SECONDS * (0.5 + random.random()))  # noqa: S311 - no secret
            try:
                # Others see the same: when one has gone, it is not better any more for the rest.
                if await self._wanted(own()):
                    await asyncio.sleep(LOOK_SECONDS * random.random())  # noqa: S311
                    now = own()
                    if (span := await self._wanted(now)) is not None:
                        return now.at(span[0])
            except Exception:
                logger.exception("looking for a better place failed; trying again")

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

    async def _wanted(self, own: Place) -> tuple[int, int] | None:
        others, serving = await self._others(own.rate)
        span = await asyncio.to_thread(better, others, self._blocks, own)
        if span is not None and own.moves is not Moves.BESIDE:
            counts, now = held(others, self._blocks), held(serving, self._blocks)
            # Whoever will have these blocks still loads them.
            if any(counts[block] and not now[block] for block in range(own.start, own.end)):
                return None
        return span

    async def _others(self, rate: float) -> tuple[list[Place], list[Place]]:
        """The servers besides this one that live, and those of them that serve already.

        Args:
            rate: of those that do not say how fast they are.
        """
        spans = await self._spans()
        peers = {span.peer for span in spans}
        pings = await asyncio.gather(*(self._node.ping(peer) for peer in peers))
        alive = {peer for peer, ping in zip(peers, pings, strict=True) if ping is not None}
        found = [
            (
                Place.announced(span.start, span.end, span.info.throughput, _moves(span.info))
                if span.info.throughput
                else Place(span.start, span.end, rate, _moves(span.info)),
                span.info.state == ServerState.ONLINE,
            )
            for span in spans
            if span.peer in alive
        ]
        return [place for place, _ in found], [place for place, serves in found if serves]

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
