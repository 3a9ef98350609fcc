"""Two parts of a swarm that do not know each other become one.

A network is cut and heals, or two servers begin at the same moment on a local network: then each
part is a swarm of its own, with records that the other does not read. hivemind forgets a peer that
does not answer, and nobody would ask it again. So a server remembers those it knew in the DHT, and
calls those again that it has lost; and it calls those of its swarm that the local network tells of
(`net.lan`). Where one answers, both sides announce themselves anew, and read each other.

What is called is an address and no more: a stranger becomes a peer of the DHT, as anybody may.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from swarm_notebook.net.addresses import parse_peers
from swarm_notebook.net.node import Node

logger: logging.Logger = logging.getLogger(__name__)

# As often as a notebook reads what servers announce (`client.servers.directory.REFRESH_PERIOD`).
LOOK_SECONDS = 10.0
# Whoever answers on a local network does so at the same time as others.
TOGETHER_SECONDS = 1.0
# Of those who are lost, so many are called at a time: each may take `node.CONNECT_TIMEOUT`.
CALLED = 8
# A machine that sleeps over night has been given up; it comes back by its own initial peers.
FORGET_SECONDS = 3600.0
# A DHT search meets some of a swarm; more are not needed to find the rest through them.
MAX_REMEMBERED = 256


@dataclass
class _Known:
    """Where a peer was, and when, by `time.monotonic`, it was there last."""

    addresses: list[str]
    when: float


class Reunion:
    """Keeps one server together with the rest of its swarm.

    Args:
        node: the server's.
        initial_peers: multiaddrs with peer ids, which are never forgotten.
        announce: lets others read this server's records soon.
        known: where peers were that the server of before knew (`remembered`).
    """

    def __init__(
        self,
        node: Node,
        initial_peers: Sequence[str],
        announce: Callable[[], None],
        known: Mapping[str, Sequence[str]],
    ):
        self._node, self._announce = node, announce
        self._known: dict[str, _Known] = {}
        for maddr in parse_peers(initial_peers):
            listed = self._known.setdefault(maddr["p2p"], _Known([], time.monotonic()))
            listed.addresses.append(str(maddr))
        self._initial = set(self._known)
        for peer, addresses in known.items():
            self._remember(peer, addresses)
        self._told = asyncio.Event()

    def hear(self, peer: str, addresses: Sequence[str]) -> None:
        """Somebody said where a server of the same swarm is: look at once."""
        self._remember(peer, addresses)
        self._told.set()

    @property
    def remembered(self) -> dict[str, list[str]]:
        """Where peers were last, those that are lost as well."""
        return {peer: known.addresses for peer, known in self._known.items()}

    def addresses(self, peer: str) -> list[str]:
        """Where a peer was last; none if it is not known."""
        return self._known[peer].addresses if peer in self._known else []

    async def look(self) -> None:
        """Call those who are lost, once."""
        there = await self._node.acquaintances()
        for peer, addresses in there.items():
            self._remember(peer, addresses)
        now = time.monotonic()
        for peer, known in list(self._known.items()):
            if peer not in self._initial and now - known.when > FORGET_SECONDS:
                del self._known[peer]
        own = self._node.peer_id.to_base58()
        lost = [peer for peer in self._known if peer not in there and peer != own]
        called = random.sample(lost, min(len(lost), CALLED))
        answers = await asyncio.gather(
            *(self._node.meet(peer, self._known[peer].addresses) for peer in called)
        )
        if any(answers):
            logger.info("%d peers of the swarm are there again, or new", sum(answers))
            self._announce()

    async def run(self) -> None:
        """`look` again and again, until it is cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), LOOK_SECONDS)
                await asyncio.sleep(TOGETHER_SECONDS)
            self._told.clear()
            try:
                await self.look()
            except Exception:
                # Whatever it was, the next round may succeed, and the requests go on.
                logger.exception("looking for peers that are lost failed; trying again")

    def _remember(self, peer: str, addresses: Sequence[str]) -> None:
        known = self._known.get(peer)
        if known is not None:
            known.when = time.monotonic()
            known.addresses = list(addresses) or known.addresses
            return
        if len(self._known) >= MAX_REMEMBERED:
            others = [other for other in self._known if other not in self._initial]
            del self._known[min(others, key=lambda other: self._known[other].when)]
        self._known[peer] = _Known(list(addresses), time.monotonic())
