"""The RPCs of a server, under Petals' names: who it is, passes forward and back, sessions.

Everything that a request may do wrong ends as a typed error of that request alone: an error frame
on a stream, an error text on a unary call. Unary answers are bounded (see
`protocol.MAX_UNARY_BYTES`), so larger ones are refused with the name of the streaming variant.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import torch
from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from swarm_notebook import __version__
from swarm_notebook.errors import ShuttingDown
from swarm_notebook.net.dht.records import to_petals_tokens
from swarm_notebook.net.identity import Identity
from swarm_notebook.net.membership.certificate import Membership, Role
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.conduct import Conduct
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor, parsed
from swarm_notebook.net.wire.stream_server import add_stream_handler
from swarm_notebook.net.wire.streams import Stream
from swarm_notebook.net.wire.traffic import COPIES, Account, Traffic
from swarm_notebook.server.engine.engine import Engine
from swarm_notebook.server.engine.kv.budget import CachePool
from swarm_notebook.server.engine.passes.gradients import SpanGradients
from swarm_notebook.server.engine.requests import Forward, Limits
from swarm_notebook.server.engine.scheduling.scheduler import BACKWARD_COST, Kind, Task
from swarm_notebook.server.engine.scheduling.worker import ComputeThread
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.session_state import SessionState
from swarm_notebook.server.rpc import messages, unary_calls
from swarm_notebook.server.rpc.adapter_upload import AdapterUploads
from swarm_notebook.server.rpc.answers import allow_pass
from swarm_notebook.server.rpc.codec import Codec, packed_bytes
from swarm_notebook.server.rpc.counters import Counters
from swarm_notebook.server.rpc.messages import Received
from swarm_notebook.server.rpc.parse import parse_backward, parse_blocks, parse_forward
from swarm_notebook.server.rpc.push import PushChannel
from swarm_notebook.server.rpc.session import ServerSession

logger: logging.Logger = logging.getLogger(__name__)

# Frames up to here are read on any server, however few tokens it takes, and then refused in words.
MIN_FRAME_BYTES = 16 << 20
# The time that p2pd gets to pass the last answers on.
LINGER_SECONDS = 0.5
# The batch that Petals' own servers name in their schemas.
_SCHEMA_TOKENS = 2048

F = TypeVar("F", bound=Forward)


class Handler:
    """Answers requests for a span; knows the sessions that are open.

    Args:
        announced: what this server has announced last, for those who ask it.
        membership: of a private swarm, whose members alone are answered. They use streams, so
            Petals' unary calls are not offered there, but for the one that asks who this is.
    """

    def __init__(
        self,
        span: Span,
        limits: Limits,
        pool: CachePool,
        compute: ComputeThread,
        engine: Engine,
        *,
        announced: Callable[[], dict[str, Any]],
        traffic: Traffic,
        membership: Membership | None = None,
    ):
        self._span, self._limits, self._engine = span, limits, engine
        self._pool, self._compute, self._announced = pool, compute, announced
        self._sessions: set[ServerSession] = set()
        # Requests by their ends, with the tasks that answer them. These may outlast the answer:
        # who was refused, or told that the server leaves, has a while to close the stream.
        self._running: dict[asyncio.Future[None], asyncio.Task[Any]] = {}
        self._codec = Codec()
        self._uploads = AdapterUploads(engine, compute, limits)
        self._traffic, self._conduct = traffic, Conduct()
        self._pushes = PushChannel(traffic)
        self._leaving = False
        self._counters = Counters()
        self._membership = membership

    async def register(self, p2p: P2P, identity: Identity) -> None:
        """Offer the RPCs to the swarm, as the peer of this key."""
        largest = self._limits.tokens * self._limits.hidden_size * 8
        frame = min(max(MIN_FRAME_BYTES, largest), self._traffic.share // COPIES)
        streams = {
            protocol.RPC_INFERENCE: self._inference,
            protocol.RPC_FORWARD_STREAM: self._forward_stream,
            protocol.RPC_BACKWARD_STREAM: self._backward_stream,
            protocol.RPC_ADAPTER: self._adapter,
        }
        member = self._membership
        self._pushes.start(p2p, identity, self._codec, member)
        for name, stream_handler in streams.items():
            traffic = self._uploads.traffic if name == protocol.RPC_ADAPTER else self._traffic
            await add_stream_handler(
                p2p,
                name,
                self._tracked(stream_handler),
                frame,
                traffic,
                conduct=self._conduct,
                membership=member,
            )
        # Not tracked: such a stream is no request, and stays open while the server leaves.
        await add_stream_handler(
            p2p,
            protocol.RPC_PUSH_STREAM,
            self._pushes.handle,
            frame,
            self._traffic,
            conduct=self._conduct,
            membership=member,
            role=Role.SERVER,
        )
        unary: dict[str, tuple[unary_calls.Answer, Callable[[bytes], Any]]]
        unary = {protocol.RPC_INFO: (self._info, partial(parsed, runtime_pb2.ExpertUID))}
        if member is None:
            unary |= {
                protocol.RPC_FORWARD: (self._forward, PackedMessage.of),
                protocol.RPC_BACKWARD: (self._backward, PackedMessage.of),
                protocol.RPC_PUSH: (self._push, PackedMessage.of),
            }
        calls = unary_calls.UnaryCalls(self._traffic, self._conduct, member)
        for name, (answer, parse) in unary.items():
            # Below P2P.add_protobuf_handler, which would parse the bytes outside our reach.
            call = self._tracked(calls.handler(answer, parse, waits=name != protocol.RPC_INFO))
            await p2p._client.add_unary_handler(name, call)

    @property
    def requests_served(self) -> int:
        """How many requests were answered since the start."""
        return self._counters.requests

    @property
    def busy(self) -> bool:
        return any(session.busy for session in self._sessions)

    async def expire(self) -> None:
        """Let go of what notebooks left behind and no longer use."""
        self._pushes.expire()
        await self._compute.submit(self._engine.expire).future

    async def leave(self, seconds: float) -> None:
        """Take no more requests; give those in flight up to ``seconds`` to be answered."""
        self._leaving = True
        for session in self._sessions:
            session.leave()
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=seconds)
            for ended in late:
                self._running[ended].cancel()
            # p2pd passes the last answers on in its own time, and cannot be asked whether it has.
            await asyncio.sleep(LINGER_SECONDS)

    async def close(self) -> None:
        """End what is left of requests and pushes, and the threads and tasks that were for them."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._pushes.close()
        self._codec.close()

    async def _inference(self, stream: Stream, peer: PeerID) -> None:
        self._check_open()
        choose = partial(self._engine.span_for, peer.to_base58())
        cache = self._engine.batching.new_cache()
        state = SessionState(self._span, self._limits.context, choose, cache)
        session = ServerSession(
            stream,
            state,
            self._limits,
            self._pool,
            self._compute,
            batching=self._engine.batching,
            pushes=self._pushes,
            counters=self._counters,
            codec=self._codec,
            others=self._sessions,
        )
        self._sessions.add(session)
        self._counters.sessions += 1
        try:
            await session.run()
        finally:
            self._sessions.discard(session)

    async def _info(self, request: runtime_pb2.ExpertUID, account: Account) -> bytes:
        blocks = self._limits.end - self._limits.start
        info: dict[str, Any] = {
            "version": __version__,
            "dht_client_mode": False,
            "start_block": self._limits.start,
            "end_block": self._limits.end,
            "cache_tokens_available": to_petals_tokens(self._pool.free, blocks),
            "cache_tokens_free": self._pool.free,
            "cache_tokens_total": self._pool.total,
            "sessions": self._pool.sessions,
            "sessions_served": self._counters.sessions,
            "requests_served": self._counters.requests,
            "traffic_bytes": self._traffic.total,
            "traffic_bytes_held": self._traffic.held,
            "tokens_served": self._counters.tokens,
            "arrival": self._counters.arrival(account.peer),
            **self._announced(),
            **self._engine.facts(),
            **self._compute.facts(),
            protocol.EXTENSION_KEY: protocol.PROTOCOL_VERSION,
        }
        if request.uid:
            parse_blocks(request.uid, self._limits)
            info.update(_schemas(self._limits.hidden_size, self._span.dtype))
        answer = runtime_pb2.ExpertInfo(serialized_info=protocol.pack_metadata(info))
        return answer.SerializeToString()

    async def _forward(self, message: PackedMessage, account: Account) -> bytes:
        return unary_calls.packed(await self._run_forward(message, account), "rpc_forward_stream")

    async def _backward(self, message: PackedMessage, account: Account) -> bytes:
        packed, metadata = await self._run_backward(message, account)
        return unary_calls.packed(packed, "rpc_backward_stream", metadata)

    async def _push(self, message: PackedMessage, _account: Account) -> bytes:
        self._pushes.take_petals(message)
        return b""

    async def _forward_stream(self, stream: Stream, _peer: PeerID) -> None:
        self._check_open()
        message = await messages.receive(stream, stream.max_frame)
        answer = self._run_forward(message, stream.account, stream)
        del message
        await messages.send(stream, await answer)

    async def _backward_stream(self, stream: Stream, _peer: PeerID) -> None:
        self._check_open()
        # Two tensors of the size of one in a forward request.
        message = await messages.receive(stream, 2 * stream.max_frame)
        answer = self._run_backward(message, stream.account, stream)
        del message
        await messages.send(stream, *await answer)

    async def _adapter(self, stream: Stream, peer: PeerID) -> None:
        self._check_open()
        await self._uploads.handle(stream, peer)

    async def _run_forward(
        self,
        message: Received | PackedMessage,
        account: Account,
        stream: Stream | None = None,
    ) -> list[PackedTensor]:
        request, compression = await self._parse(parse_forward, message)
        del message
        await allow_pass(account, request)
        task = _pass_of(account.peer, request)
        job = self._compute.submit(self._engine.forward, task.client, request, task=task)
        outputs = await messages.result(job, stream)
        self._counters.count(request)
        return await self._codec.pack(outputs, compression)

    async def _run_backward(
        self,
        message: Received | PackedMessage,
        account: Account,
        stream: Stream | None = None,
    ) -> tuple[list[PackedTensor], dict[str, Any]]:
        request, compression = await self._parse(parse_backward, message)
        del message
        await allow_pass(account, request)
        task = _pass_of(account.peer, request, BACKWARD_COST)
        job = self._compute.submit(self._engine.backward, task.client, request, task=task)
        gradients: SpanGradients = await messages.result(job, stream)
        self._counters.count(request)
        packed = await self._codec.pack(gradients.tensors, compression)
        return packed, {} if gradients.weights is None else {"adapter_grads": gradients.weights}

    async def _parse(
        self, parse: Callable[..., tuple[F, int]], message: Received | PackedMessage
    ) -> tuple[F, int]:
        """What `parse` makes of a message; in the codec's thread if it is large."""

        def parsed() -> tuple[F, int]:
            metadata = protocol.unpack_metadata(message.metadata)
            return parse(message.uid, message.tensors, metadata, self._limits)

        received = isinstance(message, Received)
        size = message.size if received else packed_bytes(message.tensors)
        return await self._codec.run(size, parsed)

    def _check_open(self) -> None:
        if self._leaving:
            raise ShuttingDown("the server is leaving the swarm, use another one")

    def _tracked(self, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Remember each call, so that `leave` can wait for it."""

        async def call(*arguments: Any) -> Any:
            task, ended = asyncio.current_task(), asyncio.get_running_loop().create_future()
            if task is not None:
                self._running[ended] = task
            try:
                return await handler(*arguments)
            finally:
                self._running.pop(ended, None)
                ended.set_result(None)

        return call


def _pass_of(peer: str, request: Forward, cost: int = 1) -> Task:
    blocks = request.blocks[1] - request.blocks[0]
    tokens = request.rows * request.length
    work = cost * tokens * blocks
    return Task(Kind.STATELESS, peer, tokens, blocks=blocks, work=work)


def _schemas(hidden_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """What Petals clients read to learn dtypes and compressions."""

    def batch(size: tuple[int, ...], kind: torch.dtype) -> BatchTensorDescriptor:
        return BatchTensorDescriptor(*size, dtype=kind, compression=tensors.NONE)

    hidden = batch((_SCHEMA_TOKENS, hidden_size), dtype)
    prompts, row_ids = batch((), dtype), batch((), torch.int64)
    return {
        "forward_schema": ((batch((1, _SCHEMA_TOKENS, hidden_size), dtype),), {}),
        "outputs_schema": (hidden,),
        "keyword_names": (),
        "inference_schema": ((hidden, prompts, row_ids), {}),
    }
