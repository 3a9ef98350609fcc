"""Calls of one message and one answer, as Petals' clients make them: bytes in, bytes or a text out.

Whatever a call does wrong ends as a text of our kind of error, which hivemind sends; a peer that
was refused often is answered late, or not at all (see `net.wire.conduct`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from hivemind.p2p import PeerID

from swarm_notebook.errors import BadRequest, NotAMember, ServerBusy, ShuttingDown, to_wire
from swarm_notebook.net.membership.certificate import Membership
from swarm_notebook.net.wire import protocol
from swarm_notebook.net.wire.conduct import Conduct
from swarm_notebook.net.wire.format import MAX_REQUEST_FIELDS, check_fields
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.stream_server import MAX_SHOWN_BYTES, shown_in
from swarm_notebook.net.wire.traffic import COPIES, Account, Traffic

logger: logging.Logger = logging.getLogger(__name__)

# A call that is answered takes so much besides its bytes: a task and a dozen objects.
CALL_BYTES = 16 << 10

Answer = Callable[[Any, Account], Awaitable[bytes]]
_TYPED = (BadRequest, NotAMember, ServerBusy, ShuttingDown)


class _WireError(Exception):
    """hivemind's unary calls send the ``repr`` of what a handler raises: let it be our text."""

    def __init__(self, error: BaseException):
        super().__init__(to_wire(error))

    def __repr__(self) -> str:
        return str(self)


class UnaryCalls:
    """Lets calls of peers in, as far as there is room, or refuses them.

    Args:
        membership: of a private swarm, whose members alone are answered.
    """

    def __init__(self, traffic: Traffic, conduct: Conduct, membership: Membership | None):
        self._traffic, self._conduct, self._membership = traffic, conduct, membership

    def handler(
        self, answer: Answer, parse: Callable[[bytes], Any], *, waits: bool
    ) -> Callable[[bytes, PeerID], Awaitable[bytes]]:
        """A handler of bytes, as hivemind's control connection wants it.

        Args:
            waits: it is late for peers that were refused often.
        """

        async def call(data: bytes, peer: PeerID) -> bytes:
            name = peer.to_base58()
            if self._conduct.cut_off(name):
                raise _WireError(ServerBusy("this peer is cut off: it was refused for too long"))
            account = self._traffic.open(name)
            try:
                self._check_member(data, peer)
                if not account.try_take(COPIES * len(data) + CALL_BYTES):
                    raise ServerBusy("too much of this peer, or of all, waits here; try again")
                if waits:
                    await self._conduct.turn(name)
                check_fields(data, MAX_REQUEST_FIELDS)
                answered = await answer(parse(data), account)
                self._conduct.answered(name, int(waits and bool(answered)))
                return answered
            except _TYPED as error:
                raise _WireError(self._conduct.refusal(name, error, len(data))) from error
            except Exception as error:
                logger.exception("a request of %s failed", peer)
                raise _WireError(error) from error
            finally:
                account.close()

        return call

    def _check_member(self, data: bytes, peer: PeerID) -> None:
        """In a private swarm, refuse a call of somebody who is not shown to be a member."""
        if self._membership is None:
            return
        shown = None
        if len(data) <= MAX_SHOWN_BYTES:
            check_fields(data, MAX_REQUEST_FIELDS)
            shown = shown_in(PackedMessage.of(data).metadata)
        self._membership.check(peer.to_base58(), shown)


def packed(
    tensors: list[PackedTensor], instead: str, metadata: dict[str, Any] | None = None
) -> bytes:
    """The bytes of an answer.

    Args:
        instead: the RPC for those that are too large.

    Raises:
        BadRequest: it is larger than `protocol.MAX_UNARY_BYTES`.
    """
    serialized = protocol.pack_metadata(metadata) if metadata else b""
    answer = PackedMessage(tensors=tensors, metadata=serialized)
    if answer.size > protocol.MAX_UNARY_BYTES:
        raise BadRequest(
            f"the answer has {answer.size} bytes, a unary call carries "
            f"{protocol.MAX_UNARY_BYTES}; use {instead}"
        )
    return answer.to_bytes()
