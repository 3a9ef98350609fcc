"""Servers that answer wrong on purpose: real ones, whose blocks were changed after they started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.hosting import HostedServer
from torch import nn

from swarm_notebook.client.request import read_proof
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.hand_overs import Signed
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.prints import Printer
from swarm_notebook.server.rpc.session import ServerSession

Lie = Callable[[list[nn.Module]], list[Any]]


def outputs(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    """Whatever leaves the last block is changed."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return lambda layers: [layers[-1].register_forward_hook(hook)]


def stale() -> Lie:
    """Every token gets what the one before should have."""
    return outputs(lambda out: out.roll(1, dims=1) if out.shape[1] > 1 else out.flip(-1))


def edited(every: int) -> Lie:
    """One token in so many is moved by a tenth of its length."""

    def change(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, ::every] += 0.1 * out[:, ::every].flip(-1)
        return out

    return outputs(change)


def noise(share: float) -> Lie:
    """Every token is moved by so much of its length, in a direction of its own."""
    return outputs(lambda out: out + share * out.norm(dim=-1, keepdim=True) * _noise(out))


def skipped(index: int) -> Lie:
    """A block does nothing."""

    def hook(_module: nn.Module, inputs: Any, output: Any) -> Any:
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    return lambda layers: [layers[index].register_forward_hook(hook)]


def rounded(bits: int) -> Lie:
    """All weights with so many bits, and a scale per output."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (weight / scale).round() * scale

    return weights(change)


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    """The weights of all products are changed."""

    def lie(layers: list[nn.Module]) -> list[Any]:
        for layer in layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data.copy_(change(module.weight.data))
        return []

    return lie


LIES: dict[str, Lie] = {
    "2 % too long": outputs(lambda out: out * 1.02),
    "zeros": outputs(torch.zeros_like),
    "noise of 1 %": noise(0.01),
    "stale": stale(),
    "a skipped block": skipped(1),
    "other weights": weights(lambda weight: weight.roll(1, dims=0)),
    "int8 weights": rounded(8),
    "int4 weights": rounded(4),
    "an edited token": edited(16),
}


class _Poisoned(torch.autograd.Function):
    """The values as they are; their gradient times a number."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


def poisoned(factor: float) -> Lie:
    """All gradients of a server are those that it should give, times a number."""
    return outputs(lambda out: with_gradient(out, factor))


def with_gradient(states: torch.Tensor, factor: float) -> torch.Tensor:
    """The states as they are, whose gradient is to be multiplied by a number."""
    changed: torch.Tensor = _Poisoned.apply(states, factor)
    return changed


GRADIENT_LIES: dict[str, Lie] = {
    "1.1 times": poisoned(1.1),
    "flipped": poisoned(-1.0),
}


@contextmanager
def handing_over(
    server: HostedServer, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Within it, what a server pushes to others is not what it tells the notebook."""
    pushes = server.handler._pushes
    push = pushes.push

    async def other(peer: str, target: Any, step_id: str, tensor: PackedTensor, client: str) -> str:
        changed = change(tensors.unpack(tensor, tensors.layout(tensor)).clone())
        return await push(peer, target, step_id, tensors.pack(changed), client)

    pushes.push = other
    try:
        yield
    finally:
        pushes.push = push


@contextmanager
def signing(server: HostedServer, signature: bytes) -> Iterator[None]:
    """Within it, a server signs so whatever it pushes."""
    pushes = server.handler._pushes
    own = pushes._identity

    class Signer:
        stated_key = own.stated_key

        def sign(self, _data: bytes) -> bytes:
            return signature

    pushes._identity = Signer()
    try:
        yield
    finally:
        pushes._identity = own


@contextmanager
def showing(shown: Callable[[Signed | None], Signed | None]) -> Iterator[None]:
    """Within it, servers of this process show something else for what was pushed to them."""
    proof = ServerSession._proof

    def other(self: ServerSession, message: PackedMessage) -> PackedMessage | None:
        answer = proof(self, message)
        if answer is None:
            return None
        found = shown(read_proof(answer.metadata))
        told = {protocol.PROOF: (found.digest, found.signature, found.key)} if found else {}
        return PackedMessage(metadata=protocol.pack_metadata(told))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerSession, "_proof", other)
        yield


@contextmanager
def misprinting(server: HostedServer, change: Callable[[int], int | None]) -> Iterator[None]:
    """Within it, a server tells another print of what was pushed to it."""
    codec = server.handler._codec
    run = codec.run

    async def other(size: int, function: Any, *arguments: Any) -> Any:
        result = await run(size, function, *arguments)
        return change(result) if function.__name__ == Printer.of.__name__ else result

    codec.run = other
    try:
        yield
    finally:
        codec.run = run


def _noise(like: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(like) / like.shape[-1] ** 0.5


@contextmanager
def lying(server: HostedServer, lie: Lie) -> Iterator[None]:
    """Within it, the server answers with changed blocks."""
    layers = server.layers
    before = [[parameter.detach().clone() for parameter in one.parameters()] for one in layers]
    handles = lie(layers)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, values in zip(layers, before, strict=True):
            for parameter, value in zip(layer.parameters(), values, strict=True):
                parameter.data.copy_(value)
