"""How far the servers of neighbouring blocks are, measured to be announced.

A chain of servers hands hidden states from one to the next, so what a step costs on the network
depends on round trips that no notebook can measure. Petals' servers measure those to servers of the
block behind their own and announce them as ``next_pings``; ours do so in both directions, because
either of two neighbours may have come first.
"""

from __future__ import annotations

import asyncio
import logging
import random

from swarm_notebook.checkpoint.files.digest import matches
from swarm_notebook.net.dht.records import MAX_PINGS, ServerInfo, ServerState, announcements
from swarm_notebook.net.node import Node, smoothed_rtt
from swarm_notebook.net.wire import protocol

logger: logging.Logger = logging.getLogger(__name__)

# A search in the DHT and a ping, each of which gives up after seconds by itself.
MEASURE_SECONDS = 10.0


class NeighbourPings:
    """Round trips from this server to those of the blocks next to its own.

    Args:
        node: this server's peer.
        prefix: the model's name in the DHT.
        blocks: the hosted range ``[start, end)``.
        digest: of the checkpoint; neighbours that serve another one are said in the log.

    Attributes:
        rtt: round trips in seconds by peer (base58 id), of at most `MAX_PINGS` neighbours.
    """

    def __init__(self, node: Node, prefix: str, blocks: tuple[int, int], digest: str):
        self.rtt: dict[str, float] = {}
        self._node, self._prefix, self._digest = node, prefix, digest
        self._warned: set[str] = set()
        # Behind the model's last block there is nothing in the DHT, and so no server is found.
        neighbours = [block for block in (blocks[0] - 1, blocks[1]) if block >= 0]
        self._uids = [protocol.block_uid(prefix, block) for block in neighbours]

    async def measure(self) -> None:
        """Find the neighbours, and measure once how far each of them is."""
        try:
            async with asyncio.timeout(MEASURE_SECONDS):
                peers = await self._neighbours()
                measured = await asyncio.gather(*(self._ping(peer) for peer in peers))
        except TimeoutError:
            logger.info("finding the servers of neighbouring blocks took too long")
            return
        self.rtt = {
            peer: smoothed_rtt(self.rtt.get(peer), seconds)
            for peer, seconds in zip(peers, measured, strict=True)
            if seconds is not None
        }

    def _compare(self, peer: str, info: ServerInfo) -> None:
        other = info.digest
        if other is None or matches(self._digest, other) or peer in self._warned:
            return
        self._warned.add(peer)
        logger.warning(
            "%s serves another checkpoint under the same name (digest %s, here %s): notebooks use "
            "the servers of their own one only; give the folder of one of them another name",
            info.public_name or peer,
            other,
            self._digest,
        )

    async def _ping(self, peer: str) -> float | None:
        first = await self._node.ping(peer)
        if first is None or peer in self.rtt:
            return first
        # The first ping may have dialled the peer besides: announced, it would send routes past
        # this server until the next measurement.
        second = await self._node.ping(peer)
        return first if second is None else min(first, second)

    async def _neighbours(self) -> list[str]:
        """Those that are known already first; of others a random choice, if there are many."""
        found = await self._node.dht.get_many(self._uids, sufficient_expiration_time=float("inf"))
        own = self._node.peer_id.to_base58()
        peers: set[str] = set()
        for value in found.values():
            for one in announcements(value, self._prefix, self._node.membership):
                if one.peer != own and one.info.state != ServerState.OFFLINE:
                    peers.add(one.peer)
                    self._compare(one.peer, one.info)
        known = [peer for peer in peers if peer in self.rtt]
        new = [peer for peer in peers if peer not in self.rtt]
        random.shuffle(new)
        return [*known, *new][:MAX_PINGS]
