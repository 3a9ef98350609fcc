"""A server for one family's tiny model, and the local model to compare its gradients with.

`Bench.call` speaks the wire as a notebook would, without any of the notebook's code. `run_blocks`
computes with the local model what a server is asked for, from the input of one block to the output
of another, so that gradients of all that is between can be compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hivemind.p2p import PeerID
from support.hosting import HostedServer
from support.patience import PATIENCE
from support.raw_wire import RawClient, ServerProcess
from torch import nn

from swarm_notebook.net.wire import protocol, streams, tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.opening import open_stream

Answer = tuple[list[torch.Tensor], dict[str, Any]]


async def call(
    client: RawClient,
    peer: PeerID,
    rpc: str,
    uid: str,
    slots: Sequence[torch.Tensor | None],
    metadata: dict[str, Any],
) -> Answer:
    """One request and its answer over a stream: tensors and metadata."""
    stream = await open_stream(client.node.p2p, peer, rpc)
    packed = protocol.pack_metadata(metadata)
    try:
        # A server that has read enough answers before it has got all.
        with suppress(streams.StreamClosed):
            for tensor in protocol.pack_slots(list(slots)):
                for part in tensors.split(tensor, protocol.PART_BYTES):
                    await stream.send(PackedMessage(uid=uid, tensors=[part], metadata=packed))
            await stream.send_end()
        parts: list[PackedTensor] = []
        answered: dict[str, Any] = {}
        async with asyncio.timeout(PATIENCE):
            while (answer := await stream.receive()) is not None:
                answered.update(protocol.unpack_metadata(answer.metadata))
                parts.extend(answer.tensors)
        return [tensors.unpack(tensor) for tensor in tensors.join(parts)], answered
    finally:
        stream.close()


@dataclass
class LocalModel:
    """A family's model in a folder, of which blocks ``[start, end)`` matter."""

    folder: Path
    start: int
    end: int

    @property
    def family(self) -> str:
        return self.folder.name.removeprefix("tiny-")


@dataclass
class Bench(LocalModel):
    """A server that hosts the blocks, a client, the model itself."""

    model: Any
    server: ServerProcess | HostedServer
    client: RawClient

    def call(
        self,
        rpc: str,
        *slots: torch.Tensor | None,
        blocks: tuple[int, int] | None = None,
        client: RawClient | None = None,
        **metadata: Any,
    ) -> Answer:
        client = client or self.client
        uid = protocol.uid_chain(self.folder.name, *(blocks or (self.start, self.end)))
        return client.run(call(client, self.server.peer, rpc, uid, slots, metadata))

    def forward(self, *slots: torch.Tensor | None, **options: Any) -> list[torch.Tensor]:
        return self.call(protocol.RPC_FORWARD_STREAM, *slots, **options)[0]

    def backward(self, *slots: torch.Tensor | None, **options: Any) -> list[torch.Tensor]:
        return self.call(protocol.RPC_BACKWARD_STREAM, *slots, **options)[0]

    def unary(self, rpc: str, message: PackedMessage) -> list[torch.Tensor]:
        answer = self.client.run(self.client.unary(self.server.peer, rpc, message))
        return [tensors.unpack(tensor) for tensor in answer.tensors]

    def info(self) -> dict[str, Any]:
        return self.client.run(self.client.info(self.server.peer))


@contextmanager
def bench_of(
    folder: Path, start: int, end: int, server: ServerProcess | HostedServer
) -> Iterator[Bench]:
    """For a server that is ready."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    client = RawClient(server.facts["maddrs"])
    try:
        yield Bench(folder, start, end, model.requires_grad_(False), server, client)
    finally:
        client.close()


class Benches(dict[str, Bench]):
    """Servers by family, started when they are first asked for."""

    def __init__(self, start: Callable[[str], Bench]):
        super().__init__()
        self._start = start

    def __missing__(self, family: str) -> Bench:
        self[family] = self._start(family)
        return self[family]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The model's own list of blocks."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise LookupError("no list of blocks")


class Done(Exception):
    """The blocks that were wanted have run."""


def run_blocks(
    model: nn.Module,
    start: int,
    end: int,
    hidden: torch.Tensor,
    *,
    prompts: torch.Tensor | None = None,
    **options: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The outputs of the local model's blocks ``[start, end)`` for ``hidden``, under autograd."""
    layers = layers_of(model)
    outputs: list[torch.Tensor] = []

    def enter(index: int) -> Any:
        def hook(_layer: Any, inputs: tuple, named: dict) -> tuple[tuple, dict]:
            changed = hidden if index == start else outputs[-1]
            if prompts is not None:
                length = prompts.shape[2]
                head = changed[:, :length] + prompts[index - start]
                changed = torch.cat([head, changed[:, length:]], dim=1)
            if inputs:
                return (changed, *inputs[1:]), named
            return inputs, {**named, "hidden_states": changed}

        return hook

    def leave(_layer: Any, _inputs: tuple, output: Any) -> None:
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])
        if len(outputs) == end - start:
            raise Done

    handles = []
    for index in range(start, end):
        layer = layers[index]
        handles.append(layer.register_forward_pre_hook(enter(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave))
    try:
        model(inputs_embeds=hidden.detach(), use_cache=False, **options)
    except Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {list(ours.shape)} and {list(theirs.shape)}")
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
