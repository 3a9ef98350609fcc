"""Petals' way of handing hidden states from server to server.

With a step, a Petals client lists the servers of the rest of its chain. Each server calls
``rpc_push`` of the first in the list, with what it was sent itself: its output takes the place of
the hidden states, and the list goes on without its head. The client sends every server the same
step too, so a push that cannot be made is no loss.

Deep prompts are the one thing that cannot be passed on, because every server has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swarm_notebook.net.wire import protocol
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.server.rpc import fields


@dataclass(frozen=True, slots=True)
class PetalsPush:
    """What goes to the next server with an output.

    Attributes:
        uid: the blocks that it is asked for.
        metadata: packed, for its session.
        slots: the tensors behind the hidden states.
    """

    uid: str
    metadata: bytes
    slots: Sequence[PackedTensor]

    def message(self, output: PackedTensor) -> PackedMessage:
        """The next server's step."""
        return PackedMessage(uid=self.uid, tensors=[output, *self.slots], metadata=self.metadata)


def read(
    metadata: dict[str, Any], slots: Sequence[PackedTensor], prefix: str, end: int
) -> tuple[str, PetalsPush]:
    """The peer that gets the output of a step whose blocks end before ``end``, and what else.

    Raises:
        BadRequest: the list of the next servers is malformed, or not of the blocks that follow.
    """
    servers = fields.next_servers(metadata, end)
    peer, session_id, first, last = servers[0]
    changed = {"session_id": session_id, protocol.NEXT_SERVERS: servers[1:], "pushed": True}
    packed = protocol.pack_metadata({**metadata, **changed})
    return peer, PetalsPush(protocol.uid_chain(prefix, first, last), packed, slots)
