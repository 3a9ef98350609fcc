"""What a server reads of its swarm to choose its blocks.

Records of servers that have died stay for a minute or two, so whoever chooses asks each server for
a sign of life, and reckons with those alone that answer.
"""

from __future__ import annotations

import asyncio
import logging
import random
import statistics

from swarm_notebook.net.dht.records import ServerSpan, ServerState, announcements, spans_of
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire import protocol
from swarm_notebook.server.presence.flow import Place
from swarm_notebook.server.presence.places import better, choose

logger: logging.Logger = logging.getLogger(__name__)

# Between two looks at the swarm, on average: one and a half of them and a random wait are half a
# minute, and reading all records costs what a notebook does, which reads them every ten seconds.
LOOK_SECONDS = 12.0


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
        others = await self._others(1.0)
        through_one = [place.rate * (place.end - place.start) for place in others]
        rate = statistics.median(through_one or [1.0]) / size
        return await asyncio.to_thread(choose, others, self._blocks, size, rate)

    async def better(self, own: Place) -> tuple[int, int]:
        """Return as soon as another place is better, and stays so for a random while.

        Args:
            own: where the server is.
        """
        while True:
            await asyncio.sleep(LOOK_SECONDS * (0.5 + random.random()))  # noqa: S311 - no secret
            try:
                # Others see the same: when one has gone, it is not better any more for the rest.
                if await self._wanted(own):
                    await asyncio.sleep(LOOK_SECONDS * random.random())  # noqa: S311
                    if (span := await self._wanted(own)) is not None:
                        return span
            except Exception:
                logger.exception("looking for a better place failed; trying again")

    async def _wanted(self, own: Place) -> tuple[int, int] | None:
        return await asyncio.to_thread(better, await self._others(own.rate), self._blocks, own)

    async def _others(self, rate: float) -> list[Place]:
        """The servers besides this one that live; those that do not say are taken for this fast."""
        spans = await self._spans()
        peers = {span.peer for span in spans}
        pings = await asyncio.gather(*(self._node.ping(peer) for peer in peers))
        alive = {peer for peer, ping in zip(peers, pings, strict=True) if ping is not None}
        return [
            Place.announced(span.start, span.end, span.info.throughput)
            if span.info.throughput
            else Place(span.start, span.end, rate)
            for span in spans
            if span.peer in alive
        ]

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
