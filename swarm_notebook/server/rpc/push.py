"""Hidden states that go from server to server, and not by way of the client.

A client tells each server of its chain, with every step, where the output goes (`push_to`) and
where the input comes from (`push_from`). Outputs travel over one long-lived stream per pair of
servers, as requests without an answer. Both sides of a push meet here by the session's id and the
step's, and only if the sender is the very peer that the client has named: nobody else can put
anything into a session.

A push may arrive before its announcement. It is kept for a moment, in bounds for each sender and
for all together; what does not fit or is never announced is dropped, and then the client sends the
states itself. So no push ever waits for a session, and a stream serves all sessions alike.

Petals' unary ``rpc_push`` is called and taken as well (see `petals_push`), for clients that
announce nothing. They send the same step directly, too: whichever comes first counts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hivemind.p2p import P2P, PeerID

from swarm_notebook.errors import BadRequest, RemoteError
from swarm_notebook.net.identity import MAX_KEY_BYTES, Identity
from swarm_notebook.net.membership.certificate import Membership
from swarm_notebook.net.wire import hand_overs, protocol
from swarm_notebook.net.wire.hand_overs import MAX_SIGNATURE_BYTES, Claim, PushedStep
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.opening import abort_opened, open_stream
from swarm_notebook.net.wire.streams import TRANSPORT_ERRORS, Stream
from swarm_notebook.net.wire.traffic import COPIES, Account, Traffic
from swarm_notebook.server.rpc import fields
from swarm_notebook.server.rpc.codec import Codec
from swarm_notebook.server.rpc.petals_push import PetalsPush

logger: logging.Logger = logging.getLogger(__name__)

# Beyond it a push has failed, and the client, which waits for the step, sends the states itself.
PUSH_SECONDS = 4.0
# How long a silent server is not tried again, or each step would take `PUSH_SECONDS` longer.
AVOID_SECONDS = 30.0
MAX_STREAMS, MAX_CALLS = 64, 64
# A push comes before its announcement by the difference of two paths, not by seconds.
EARLY_SECONDS = 10.0
# Two prompts of 1,024 tokens at hidden size 4,096 in float32; and those of four such peers.
EARLY_BYTES_PER_PEER = 32 << 20
EARLY_BYTES = 128 << 20
# What one takes besides its bytes.
EARLY_ENTRY_BYTES = 4096
# All that a server which is pushed to may say is why it ends the stream.
MAX_REPLY_BYTES = 64 << 10

# Takes what was pushed, how many bytes it had, and whose it is said to be.
Arrived = Callable[[PackedTensor, int, Claim], None]


@dataclass
class _Early:
    """A push that nobody has announced yet."""

    tensor: PackedTensor
    size: int
    claim: Claim
    account: Account
    when: float


class PushChannel:
    """Pushes of one server, out and in; belongs to the loop."""

    def __init__(self, traffic: Traffic) -> None:
        self._p2p: P2P | None = None
        self._identity: Identity | None = None
        self._codec: Codec | None = None
        self._membership: Membership | None = None
        self._traffic = traffic
        self._streams: OrderedDict[str, asyncio.Future[Stream]] = OrderedDict()
        self._listening: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._avoided: dict[str, float] = {}
        self._expected: dict[tuple[str, str], tuple[str, Arrived]] = {}
        self._early: OrderedDict[tuple[str, str, str], _Early] = OrderedDict()
        self._early_bytes: Counter[str] = Counter()
        self._plain: dict[str, Callable[[PackedMessage], None]] = {}

    def start(
        self, p2p: P2P, identity: Identity, codec: Codec, membership: Membership | None = None
    ) -> None:
        """From now on pushes can be sent.

        Args:
            identity: signs them.
            codec: hashes what is large.
            membership: in a private swarm.
        """
        self._p2p, self._identity, self._codec = p2p, identity, codec
        self._membership = membership

    async def close(self) -> None:
        self._p2p = None
        streams = list(self._streams.values())
        for peer in list(self._streams):
            self._drop(peer)
        tasks: list[asyncio.Future[Any]] = [*streams, *self._listening, *self._calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for key in list(self._early):
            self._pop_early(key)

    async def push(
        self, peer: str, target: str | PetalsPush, step_id: str, tensor: PackedTensor, client: str
    ) -> str:
        """Send hidden states to the server that is next; an empty text, or why that failed.

        Args:
            target: the session there; or what goes along in Petals' form, in which case nobody
                waits for it, and nobody misses it.
            client: the peer that has asked for it.
        """
        if isinstance(target, PetalsPush):
            self._call_petals(peer, target.message(tensor))
            return ""
        if self._avoided.get(peer, 0.0) > time.monotonic():
            return "it could not be reached a moment ago"
        metadata: dict[str, Any] = {"session_id": target, "step_id": step_id}
        if self._identity is not None and self._codec is not None:
            step = PushedStep(client, target, step_id)
            size = len(tensor.buffer)
            signed = await self._codec.run(size, hand_overs.sign, self._identity, step, tensor)
            metadata[protocol.SIGNATURE] = signed.signature
            if signed.key:
                metadata[protocol.SIGNATURE_KEY] = signed.key
        message = PackedMessage(tensors=[tensor], metadata=protocol.pack_metadata(metadata))
        try:
            async with asyncio.timeout(PUSH_SECONDS):
                await (await self._stream(peer)).send(message)
        except TRANSPORT_ERRORS as error:
            self._drop(peer)
            # A stream may break because its peer has started anew: only silence is held against it.
            if isinstance(error, TimeoutError):
                self._avoid(peer)
            return str(error) or "it does not take anything"
        return ""

    def _call_petals(self, peer: str, message: PackedMessage) -> None:
        """Call Petals' ``rpc_push``, if that is likely to succeed."""
        size = message.size
        too_large = size > protocol.MAX_UNARY_BYTES
        avoided = self._avoided.get(peer, 0.0) > time.monotonic()
        if too_large or avoided or len(self._calls) >= MAX_CALLS:
            return
        account = self._traffic.open(peer)
        if not account.try_take(COPIES * size):
            return
        call = asyncio.create_task(self._call(peer, message.to_bytes()))
        call.add_done_callback(lambda _: account.close())
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _call(self, peer: str, message: bytes) -> None:
        try:
            async with asyncio.timeout(PUSH_SECONDS):
                await self._connected()._client.call_unary_handler(
                    _peer_id(peer), protocol.RPC_PUSH, message
                )
        except TRANSPORT_ERRORS as error:
            logger.info("a push to %s has failed: %s", peer, error)
            if isinstance(error, TimeoutError):
                self._avoid(peer)

    def expect(self, peer: str, session_id: str, step_id: str, arrived: Arrived) -> None:
        """A client announces a push of ``peer``.

        Raises:
            BadRequest: this push is announced already.
        """
        key = session_id, step_id
        if key in self._expected:
            raise BadRequest(f"step_id: {step_id[:80]!r} of this session is announced already")
        early = self._pop_early((peer, *key))
        if early is not None:
            arrived(early.tensor, early.size, early.claim)
        else:
            self._expected[key] = peer, arrived

    def forget(self, session_id: str, step_id: str, arrived: Arrived) -> None:
        """A push that was expected is not needed any more."""
        _, known = self._expected.get((session_id, step_id), ("", None))
        if known is arrived:
            del self._expected[session_id, step_id]

    def expire(self) -> None:
        """Drop pushes that nobody has announced in time."""
        since = time.monotonic() - EARLY_SECONDS
        while self._early:
            oldest = next(iter(self._early))
            if self._early[oldest].when > since:
                break
            self._pop_early(oldest)

    def _pop_early(self, key: tuple[str, str, str]) -> _Early | None:
        early = self._early.pop(key, None)
        if early is not None:
            self._early_bytes[key[0]] -= early.account.held
            if not self._early_bytes[key[0]]:
                del self._early_bytes[key[0]]
            early.account.close()
        return early

    def admit(self, session_id: str, put: Callable[[PackedMessage], None]) -> None:
        """A Petals client's session takes steps that are pushed to it."""
        self._plain.setdefault(session_id, put)

    def dismiss(self, session_id: str, put: Callable[[PackedMessage], None]) -> None:
        if self._plain.get(session_id) == put:
            del self._plain[session_id]

    async def handle(self, stream: Stream, peer: PeerID) -> None:
        """Take what a server pushes, for as long as it does."""
        sender = peer.to_base58()
        while (message := await stream.receive()) is not None:
            try:
                self._take(sender, message, stream.size, stream.max_frame)
            except BadRequest as error:
                # Other sessions share the stream, and the one that misses it says so.
                logger.debug("a push of %s was dropped: %s", sender, error)
            # What is kept has an account of its own, or that of its session.
            stream.account.resize(0)

    def take_petals(self, message: PackedMessage) -> None:
        """Petals' ``rpc_push``."""
        metadata = protocol.unpack_metadata(message.metadata)
        if not fields.text(metadata, "step_id"):
            raise BadRequest("rpc_push: no step_id, by which to know the client's own copy")
        put = self._plain.get(fields.text(metadata, "session_id") or "")
        if put is None:
            raise BadRequest("rpc_push: no session that takes pushes has this session_id")
        put(message)

    def _take(self, sender: str, message: PackedMessage, size: int, limit: int) -> None:
        metadata = protocol.unpack_metadata(message.metadata)
        session_id, step_id = fields.text(metadata, "session_id"), fields.text(metadata, "step_id")
        if not session_id or not step_id or len(message.tensors) != 1:
            raise BadRequest("a push has a session_id, a step_id and one tensor")
        claim = Claim(
            sender,
            fields.some_bytes(metadata, protocol.SIGNATURE, MAX_SIGNATURE_BYTES),
            fields.some_bytes(metadata, protocol.SIGNATURE_KEY, MAX_KEY_BYTES),
        )
        expected = self._expected.get((session_id, step_id))
        if expected is None:
            self._keep((sender, session_id, step_id), message.tensors[0], size, claim, limit)
            return
        named, arrived = expected
        if named != sender:
            raise BadRequest("a push into a session whose client has named another server")
        del self._expected[session_id, step_id]
        arrived(message.tensors[0], size, claim)

    def _keep(
        self, key: tuple[str, str, str], tensor: PackedTensor, size: int, claim: Claim, limit: int
    ) -> None:
        """Hold a push until it is announced, if there is room."""
        self.expire()
        # Of each peer and of all: to add them up for every push would take a flood's square.
        mine, everybody = self._early_bytes[key[0]], self._early_bytes.total()
        fits = mine + size <= min(EARLY_BYTES_PER_PEER, limit) and everybody + size <= EARLY_BYTES
        account = self._traffic.open(key[0])
        self._pop_early(key)
        if not fits or not account.try_take(size + EARLY_ENTRY_BYTES):
            logger.debug("a push of %s that nobody announced was dropped", key[0])
            return
        self._early[key] = _Early(tensor, size, claim, account, time.monotonic())
        self._early_bytes[key[0]] += account.held

    def _avoid(self, peer: str) -> None:
        now = time.monotonic()
        if len(self._avoided) >= MAX_STREAMS:
            self._avoided = {name: until for name, until in self._avoided.items() if until > now}
        if len(self._avoided) < MAX_STREAMS:
            self._avoided[peer] = now + AVOID_SECONDS

    async def _stream(self, peer: str) -> Stream:
        """The stream to a server, opened by the first who needs it."""
        opening = self._streams.get(peer)
        if opening is None:
            opening = asyncio.ensure_future(self._open(peer))
            self._streams[peer] = opening
            if len(self._streams) > MAX_STREAMS:
                self._drop(next(iter(self._streams)))
        self._streams.move_to_end(peer)
        # Shielded: one session that gives up must not end it for the others.
        return await asyncio.shield(opening)

    def _connected(self) -> P2P:
        if self._p2p is None:
            raise ConnectionError("this server is not connected yet")
        return self._p2p

    async def _open(self, peer: str) -> Stream:
        stream = await open_stream(
            self._connected(),
            _peer_id(peer),
            protocol.RPC_PUSH_STREAM,
            max_frame=MAX_REPLY_BYTES,
            membership=self._membership,
        )
        opening = asyncio.current_task()
        listening = asyncio.create_task(self._listen(peer, stream, opening))
        self._listening.add(listening)
        listening.add_done_callback(self._listening.discard)
        return stream

    async def _listen(self, peer: str, stream: Stream, opening: object) -> None:
        """The other side says nothing, unless to end the stream: then the next push opens anew."""
        try:
            await stream.receive()
        except (RemoteError, ConnectionError) as error:
            logger.info("the stream to %s for pushes has ended: %s", peer, error)
        stream.abort()
        if self._streams.get(peer) is opening:
            del self._streams[peer]

    def _drop(self, peer: str) -> None:
        opening = self._streams.pop(peer, None)
        if opening is not None:
            # Not cancelled: others may wait for it just now.
            opening.add_done_callback(abort_opened)


def _peer_id(peer: str) -> PeerID:
    try:
        return PeerID.from_base58(peer)
    except ValueError:
        raise ConnectionError(f"{peer[:80]!r} is not a peer id") from None
