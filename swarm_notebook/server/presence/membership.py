"""A server's part in its private swarm: who is revoked, and who may join.

Every server reads the list of those who are revoked, and passes it on, so that it lasts while the
swarm does. Where the swarm's key is, it is made, too, and invitations are redeemed: commands on the
same machine write into the swarm's book, which is looked into once a second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from swarm_notebook.net.membership.authority import Authority
from swarm_notebook.net.node import Node

logger: logging.Logger = logging.getLogger(__name__)

# As often as a notebook reads what servers announce (`client.servers.directory.REFRESH_PERIOD`).
READ_SECONDS = 10.0
LOOK_SECONDS = 1.0
# A list that nobody passes on any more is gone after some readings.
LIST_SECONDS = 120.0


class MembershipKeeper:
    """Keeps one server's knowledge of its swarm fresh.

    Args:
        node: the server's.
        authority: the swarm's, if its key is on this machine.
        addresses: where the server is reached.
        model: its name for those who are invited; empty if it has none that others know.
    """

    def __init__(
        self, node: Node, authority: Authority | None, addresses: Sequence[str], model: str
    ) -> None:
        self._node, self._authority = node, authority
        self._addresses, self._model = list(addresses), model
        self._passed_on = b""
        self._read = float("-inf")

    async def update(self) -> None:
        """Look once, and do what is due."""
        member, authority = self._node.membership, self._authority
        if member is None:
            return
        if authority is not None:
            member.learn(await asyncio.to_thread(authority.revocations))
        due = time.monotonic() - self._read >= READ_SECONDS
        if due:
            self._read = time.monotonic()
            if authority is not None:
                own = self._node.peer_id.to_base58()
                await asyncio.to_thread(authority.runs, own, self._addresses, self._model)
            await self._node.learn_revocations()
        if due or member.revocations != self._passed_on:
            self._passed_on = member.revocations
            await self._node.pass_on_revocations(LIST_SECONDS)

    async def run(self) -> None:
        """`update` again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(READ_SECONDS if self._authority is None else LOOK_SECONDS)
            try:
                await self.update()
            except Exception:
                # Whatever it was, the next round may succeed, and the requests go on.
                logger.exception("reading who is a member failed; trying again")

    async def stop(self) -> None:
        """Invitations lead here no more."""
        if self._authority is not None:
            own = self._node.peer_id.to_base58()
            await asyncio.to_thread(self._authority.ends, own)
