"""A peer that speaks Petals' protocol by hivemind's own client and server code.

`TransformerConnectionHandler` bears the name under which Petals' servers answer; its stub is what
Petals' clients call them with. `PetalsPeer` computes with the blocks of a model, and says and reads
nothing beyond Petals: no key of ours, no slot behind the third.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# hivemind knows a stream by typing's own name for it.
from typing import Any, AsyncIterator  # noqa: UP035

import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p import P2PContext
from hivemind.p2p.servicer import ServicerBase
from hivemind.proto.runtime_pb2 import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID, Tensor
from hivemind.utils import MSGPackSerializer
from hivemind.utils.asyncio import aiter_with_timeout, as_aiter
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming
from hivemind.utils.timed_storage import get_dht_time

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.client.loop import LoopThread
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire.protocol import PART_BYTES
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.session_state import SessionState

ONLINE = 2
CACHE_TOKENS = 3000
VALID_SECONDS = 300.0
STEP_SECONDS = 120.0


class TransformerConnectionHandler(ServicerBase):
    """Petals' RPCs; here only their names and kinds, from which hivemind makes the stub."""

    async def rpc_info(self, request: ExpertUID, context: P2PContext) -> ExpertInfo:
        raise NotImplementedError

    async def rpc_forward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        raise NotImplementedError

    async def rpc_backward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        raise NotImplementedError

    async def rpc_push(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        raise NotImplementedError

    async def rpc_forward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        raise NotImplementedError
        yield

    async def rpc_backward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        raise NotImplementedError
        yield

    async def rpc_inference(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        raise NotImplementedError
        yield


def message(uid: str, *tensors: torch.Tensor, **metadata: Any) -> ExpertRequest:
    """A request as Petals' client packs it; dummies stand for what is not used."""
    packed = [serialize_torch_tensor(tensor) for tensor in tensors]
    return ExpertRequest(uid=uid, tensors=packed, metadata=MSGPackSerializer.dumps(metadata))


def in_parts(uid: str, *tensors: torch.Tensor, **metadata: Any) -> AsyncIterator[ExpertRequest]:
    """The same in parts of one tensor each, for the streaming variants."""
    packed = MSGPackSerializer.dumps(metadata)
    parts = (
        ExpertRequest(uid=uid, tensors=[part], metadata=packed)
        for tensor in tensors
        for part in split_for_streaming(serialize_torch_tensor(tensor), PART_BYTES)
    )
    return as_aiter(*parts)


async def tensors_of(stream: AsyncIterator[Any]) -> list[torch.Tensor]:
    """All tensors that come in parts, to the end of the stream."""
    found: list[list[Tensor]] = []
    async for each in aiter_with_timeout(stream, STEP_SECONDS):
        for part in each.tensors:
            if part.dtype:
                found.append([])
            found[-1].append(part)
    return [deserialize_torch_tensor(combine_from_streaming(parts)) for parts in found]


async def conversation(
    stub: Any, requests: Sequence[ExpertRequest], before: Any = None
) -> list[torch.Tensor]:
    """The answers to a session's requests, each sent when the one before was answered.

    It ends as Petals' clients end it: with an empty request, and a wait for the server's end.

    Args:
        before: an async function that is called with the number of a request before it is sent.
    """
    answered = asyncio.Semaphore(1)

    async def sent() -> AsyncIterator[ExpertRequest]:
        for number, request in enumerate(requests):
            await answered.acquire()
            if before is not None:
                await before(number)
            yield request
        await answered.acquire()
        yield ExpertRequest()

    found = []
    async for answer in aiter_with_timeout(await stub.rpc_inference(sent()), STEP_SECONDS):
        found.append(deserialize_torch_tensor(answer.tensors[0]))
        answered.release()
    return found


def nothing() -> torch.Tensor:
    """A dummy in the place of prompts."""
    return torch.empty(0)


def all_rows() -> torch.Tensor:
    """A dummy in the place of row ids."""
    return torch.empty(0, dtype=torch.int64)


class PetalsPeer(TransformerConnectionHandler):
    """Serves blocks ``[start, end)``.

    Attributes:
        seen: names of the RPCs that were called, in order.
        most: tokens that a session may reserve.
        reserved: what sessions have reserved, in order.
    """

    def __init__(self, folder: Path, start: int, end: int):
        self._source = resolve(folder)
        loaded = load_blocks(self._source, start, end, dtype=torch.float32)
        self._span = Span(loaded.decoder, loaded.layers_name, start)
        self.seen: list[str] = []
        self.most = 1 << 14
        self.reserved: list[int] = []

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        return TransformerConnectionHandler._get_handle_name(namespace, method_name)

    async def announce(self, node: Node) -> None:
        """Answer at a node, and say so under the key of every block."""
        await self.add_p2p_handlers(node.p2p)
        facts = {"start_block": self._span.start, "end_block": self._span.end}
        blocks = self._span.end - self._span.start
        facts |= {"cache_tokens_left": CACHE_TOKENS * blocks * 2}
        facts |= {"inference_rps": 1e4, "forward_rps": 1e4, "torch_dtype": "float32"}
        keys = [
            f"{self._source.dht_prefix}.{index}"
            for index in range(self._span.start, self._span.end)
        ]
        stored = await node.dht.store_many(
            keys,
            [(ONLINE, 1e4, facts)] * len(keys),
            get_dht_time() + VALID_SECONDS,
            subkeys=[node.peer_id.to_base58()] * len(keys),
        )
        assert all(stored.values())

    async def rpc_info(self, request: ExpertUID, context: P2PContext) -> ExpertInfo:
        return ExpertInfo(serialized_info=MSGPackSerializer.dumps({"version": "2.3.0"}))

    async def rpc_forward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        self.seen.append("rpc_forward")
        given = [deserialize_torch_tensor(tensor) for tensor in request.tensors]
        return ExpertResponse(tensors=[serialize_torch_tensor(self._forward(request.uid, given))])

    async def rpc_forward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        self.seen.append("rpc_forward_stream")
        uid, given = await self._gathered(requests)
        for part in split_for_streaming(serialize_torch_tensor(self._forward(uid, given)), 1 << 12):
            yield ExpertResponse(tensors=[part])

    async def rpc_backward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        self.seen.append("rpc_backward_stream")
        uid, (hidden, grad, prompts) = await self._gathered(requests)
        given = [hidden]
        if prompts.numel():
            # The gradient comes back for each row.
            given.append(prompts.expand(-1, hidden.shape[0], -1, -1).clone())
        with torch.enable_grad():
            for tensor in given:
                tensor.requires_grad_(True)
            found = torch.autograd.grad(self._compute(uid, *given), given, grad)
        for tensor in found:
            for part in split_for_streaming(serialize_torch_tensor(tensor), 1 << 12):
                yield ExpertResponse(tensors=[part])

    async def rpc_inference(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        self.seen.append("rpc_inference")
        state, blocks, length, batch = SessionState(self._span, context=None), None, 0, 0
        async for request in requests:
            if not request.uid:
                break
            hidden, prompts, rows = map(deserialize_torch_tensor, request.tensors[:3])
            assert not prompts.numel()
            metadata = MSGPackSerializer.loads(request.metadata)
            if blocks is None:
                blocks, length = self._blocks(request.uid), metadata["max_length"]
                if not 0 <= length <= self.most:
                    raise ValueError(
                        f"Cannot allocate KV cache for {length} tokens, max = {self.most}"
                    )
                self.reserved.append(length)
                batch = hidden.shape[0]
            if hidden.shape[0] != batch:
                raise ValueError(f"{hidden.shape[0]} rows, the cache has {batch}")
            # As Petals' releases do, which read no place: each token is one more.
            step = Step(blocks, hidden)
            step.row_ids = rows.tolist() if rows.numel() else None
            position = state.check(step)
            if position + step.length > length:
                raise ValueError(
                    f"Maximum length exceeded: prefix {position} + current {step.length} exceeds "
                    f"pre-allocated maximum {length}"
                )
            if (needed := state.needs(step, position)) is not None:
                state.cache.reserve(needed[0] // step.rows)
            (output,) = state.run(step, position, 0, step.length)
            yield ExpertResponse(tensors=[serialize_torch_tensor(output.clone())])

    async def _gathered(
        self, requests: AsyncIterator[ExpertRequest]
    ) -> tuple[str, list[torch.Tensor]]:
        got = [request async for request in requests]
        return got[0].uid, await tensors_of(as_aiter(*got))

    def _blocks(self, uid: str) -> tuple[int, int]:
        indices = [int(part.rpartition(".")[2]) for part in uid.split()]
        return indices[0], indices[-1] + 1

    def _forward(self, uid: str, given: Sequence[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return self._compute(uid, *given[:2])

    def _compute(
        self, uid: str, hidden: torch.Tensor, prompts: torch.Tensor | None = None
    ) -> torch.Tensor:
        start, end = self._blocks(uid)
        if prompts is None or not prompts.numel():
            return self._span.compute(start, end, hidden)[0]
        for block in range(start, end):
            missing = hidden.shape[1] - prompts.shape[2]
            added = torch.nn.functional.pad(prompts[block - start], (0, 0, 0, missing))
            hidden = self._span.compute(block, block + 1, hidden + added)[0]
        return hidden


@contextmanager
def petals_swarm(
    folder: Path, spans: Sequence[tuple[int, int]], daemons: list[int] | None = None
) -> Iterator[tuple[list[str], list[PetalsPeer]]]:
    """Petals peers in this process, and the address to join them at.

    Args:
        daemons: gets the process ids of their network daemons.
    """
    thread = LoopThread()
    nodes: list[Node] = []

    async def start() -> list[PetalsPeer]:
        peers = []
        for span in spans:
            known = await nodes[0].addresses() if nodes else []
            nodes.append(await Node.start(known, client=False))
            peers.append(PetalsPeer(folder, *span))
            await peers[-1].announce(nodes[-1])
        return peers

    async def stop() -> None:
        await asyncio.gather(*(node.stop() for node in nodes))

    peers = thread.run(start())
    if daemons is not None:
        daemons.extend(node.p2p._child.pid for node in nodes)
    try:
        yield thread.run(nodes[0].addresses()), peers
    finally:
        thread.run(stop())
        thread.loop.call_soon_threadsafe(thread.loop.stop)
