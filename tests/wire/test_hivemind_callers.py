"""Our servers called by hivemind's own client code, of which Petals' clients consist."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.compression import deserialize_torch_tensor
from hivemind.proto.runtime_pb2 import CompressionType, ExpertRequest, ExpertUID
from hivemind.utils import MSGPackSerializer
from support.hosting import HostedServer, HostedSwarm
from support.petals_peer import (
    TransformerConnectionHandler,
    all_rows,
    conversation,
    in_parts,
    message,
    nothing,
    tensors_of,
)
from support.raw_wire import RawClient
from transformers import AutoModelForCausalLM

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.net.wire import tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor

HIDDEN = 48
ROOM = 1 << 17  # tokens in the cache of our server


class Caller:
    """hivemind's client, and a server of ours with blocks 1 to 3."""

    def __init__(self, folder: Path, server: HostedServer, client: RawClient):
        self._client, self.server = client, server
        self.uid = " ".join(f"{resolve(folder).dht_prefix}.{index}" for index in (1, 2, 3))
        self.stub: Any = TransformerConnectionHandler.get_stub(client.node.p2p, server.peer)
        self.run = client.run
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False).model

    async def records(self, keys: list[str]) -> list[Any]:
        """What the server says of itself in the DHT."""
        found = await self._client.node.dht.get_many(keys)
        return [found[key].value[self.server.peer.to_base58()] for key in keys]

    def local(self, hidden: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(hidden.shape[1])[None]
        rotations = self.model.rotary_emb(hidden, ids)
        mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        for layer in self.model.layers[1:4]:
            hidden = layer(
                hidden, attention_mask=mask, position_ids=ids, position_embeddings=rotations
            )
        return hidden


@pytest.fixture(scope="module")
def caller(tiny_llama: Path) -> Iterator[Caller]:
    with HostedSwarm(tiny_llama, [(1, 4)], cache_tokens=ROOM) as swarm:
        client = RawClient(swarm.initial_peers)
        yield Caller(tiny_llama, swarm.servers[0], client)
        client.close()


def states(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_info(caller: Caller) -> None:
    answer = caller.run(caller.stub.rpc_info(ExpertUID(uid=caller.uid)))
    info = MSGPackSerializer.loads(answer.serialized_info)
    assert {"version", "cache_tokens_available", "forward_schema", "inference_schema"} <= set(info)
    # Petals counts the keys and the values of each block.
    assert info["cache_tokens_available"] == info["cache_tokens_free"] * 3 * 2


def test_room_in_the_cache_is_announced_in_petals_unit(caller: Caller) -> None:
    found = caller.run(caller.records(caller.uid.split()))
    assert [record.value[2]["cache_tokens_left"] for record in found] == [ROOM * 3 * 2] * 3


def test_forward_and_backward(caller: Caller) -> None:
    hidden, grad = states(2, 7), states(2, 7, seed=1)

    async def work() -> tuple[Any, Any]:
        forward = await caller.stub.rpc_forward(message(caller.uid, hidden, nothing(), points=0.0))
        request = message(caller.uid, hidden, grad, nothing(), points=0.0)
        return forward, await caller.stub.rpc_backward(request)

    forward, backward = caller.run(work())
    given = hidden.clone().requires_grad_(True)
    expected = caller.local(given)
    expected.backward(grad)
    close(unpacked(forward)[0], expected.detach())
    close(unpacked(backward)[0], given.grad)


@pytest.mark.parametrize(
    "kind", ["MEANSTD_16BIT", "UNIFORM_8BIT", "QUANTILE_8BIT", "BLOCKWISE_8BIT"]
)
@pytest.mark.works(
    "Petals' clients: `MEANSTD_16BIT`, `UNIFORM_8BIT`, `QUANTILE_8BIT`, `BLOCKWISE_8BIT`"
)
def test_compressions_of_hivemind(caller: Caller, kind: str) -> None:
    """The input comes in it, and the output is asked for in it."""
    compression = CompressionType.Value(kind)
    hidden = states(2, 7)
    asked = message(caller.uid, hidden, nothing(), output_compression=(compression,))
    packed = PackedMessage(tensors=[tensors.pack(hidden, compression)]).to_bytes()
    asked.tensors[0].CopyFrom(ExpertRequest.FromString(packed).tensors[0])
    answer = caller.run(caller.stub.rpc_forward(asked))
    assert answer.tensors[0].compression == compression
    got, expected = tensors.unpack(PackedTensor.of(answer.tensors[0])), caller.local(hidden)
    error = (got - expected).norm() / expected.norm()
    assert float(error) < (0.01 if kind == "MEANSTD_16BIT" else 0.3)
    if kind == "MEANSTD_16BIT":  # the others hivemind cannot read with today's numpy
        torch.testing.assert_close(deserialize_torch_tensor(answer.tensors[0]), got)


def test_a_compression_that_is_not_read(caller: Caller) -> None:
    for field in ("tensor", "output_compression"):
        options = {"output_compression": (63,)} if field == "output_compression" else {}
        asked = message(caller.uid, states(2, 7), nothing(), **options)
        if field == "tensor":
            asked.tensors[0].compression = 63
        with pytest.raises(Exception, match=r"compression.*63.*(NONE|one of)"):
            caller.run(caller.stub.rpc_forward(asked))


@pytest.mark.parametrize("rows", [1, 400])
def test_streams_of_forward_and_backward(caller: Caller, rows: int) -> None:
    hidden, grad = states(rows, 8), states(rows, 8, seed=1)

    async def work() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        forward = await caller.stub.rpc_forward_stream(in_parts(caller.uid, hidden, nothing()))
        outputs = await tensors_of(forward)
        request = in_parts(caller.uid, hidden, grad, nothing())
        return outputs, await tensors_of(await caller.stub.rpc_backward_stream(request))

    (output,), (found, *_) = caller.run(work())
    given = hidden.clone().requires_grad_(True)
    expected = caller.local(given)
    expected.backward(grad)
    close(output, expected.detach())
    close(found, given.grad)


def test_a_session_to_its_end(caller: Caller) -> None:
    hidden, requests = states(2, 9), []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        first = {"max_length": 16, "session_id": "s"} if not begin else {}
        tensors = hidden[:, begin:end], nothing(), all_rows()
        named = {"step_id": f"step {begin}", "start_from_position": begin, **first}
        requests.append(message(caller.uid, *tensors, **named))
    got = caller.run(conversation(caller.stub, requests))
    close(torch.cat(got, dim=1), caller.local(hidden))


def test_a_push(caller: Caller) -> None:
    """A Petals server hands the second step to our session before the client's copy comes."""
    hidden = states(1, 5)
    named = {"session_id": "pushed to", "max_length": 16}
    requests = [
        message(caller.uid, part, nothing(), all_rows(), step_id=step, **named)
        for step, part in (("one", hidden[:, :4]), ("two", hidden[:, 4:]))
    ]

    async def push(number: int) -> None:
        if number == 1:
            tensors = hidden[:, 4:], nothing(), all_rows()
            pushed = message(caller.uid, *tensors, step_id="two", pushed=True, **named)
            await caller.stub.rpc_push(pushed)

    got = caller.run(conversation(caller.stub, requests, before=push))
    close(torch.cat(got, dim=1), caller.local(hidden))


def test_an_error_comes_as_one(caller: Caller) -> None:
    async def work() -> None:
        request = in_parts(caller.uid, torch.zeros(1, 2, HIDDEN + 1), nothing())
        await tensors_of(await caller.stub.rpc_forward_stream(request))

    with pytest.raises(Exception, match="hidden states: shape"):
        caller.run(work())


def unpacked(answer: Any) -> list[torch.Tensor]:
    return [deserialize_torch_tensor(tensor) for tensor in answer.tensors]
