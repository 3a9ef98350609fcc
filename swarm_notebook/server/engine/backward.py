"""Gradients through the hosted blocks: a forward pass that autograd recorded, and the way back.

The base weights never require gradients, so an `AutogradPass` holds only what the gradients of
hidden states, prompts and adapter weights need. It knows the output of every block, so that one
pass serves a backward through any run of its blocks, with the gradients at any boundary.

`record` counts the bytes that autograd saves while it saves them (weights are not counted, shared
storage once; something for its nodes) and breaks off when there is no room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from swarm_notebook.server.engine.requests import Backward, Forward
from swarm_notebook.server.engine.span import Span

# What autograd takes for a block besides tensors, about: with few tokens it is more than they are.
NODE_BYTES = 64 << 10


class NoRoom(Exception):
    """A forward pass would leave more behind than may be kept."""


@dataclass
class SpanGradients:
    """Of the input, of the prompts if there are any, of the boundaries asked for, of ``weights``.

    Attributes:
        weights: the names of the adapter's parameters whose gradients come last; None without one.
    """

    tensors: list[torch.Tensor]
    weights: list[str] | None


@dataclass
class AutogradPass:
    """A recorded forward pass.

    Attributes:
        span: the blocks that computed it.
        request: what was computed.
        hidden, prompts: the leaves of the graph, together with the span's adapter weights.
        outputs: the output of every block, by index.
    """

    span: Span
    request: Forward
    hidden: torch.Tensor
    prompts: torch.Tensor | None
    outputs: dict[int, torch.Tensor]

    def serves(self, wanted: Backward) -> bool:
        """Whether a backward request follows from this pass, through all or some of its blocks."""
        made = self.request
        return (
            made.blocks[0] <= wanted.blocks[0]
            and wanted.blocks[1] <= made.blocks[1]
            and made.hidden.shape == wanted.hidden.shape
            and _lengths(made) == _lengths(wanted)
            and (made.adapter, made.seed) == (wanted.adapter, wanted.seed)
        )

    def gradients(self, wanted: Backward, *, keep: bool = False) -> SpanGradients:
        """The gradients that a backward request wants.

        Args:
            wanted: a request that this graph serves.
            keep: whether the graph is needed again.
        """
        start, end = wanted.blocks
        first = self.request.blocks[0]
        sources = [self.hidden if start == first else self.outputs[start - 1]]
        if self.prompts is not None:
            sources.append(self.prompts)
        sources += [self.outputs[index] for index in wanted.states]
        weights = self.span.adapter_weights(start, end)
        sources += weights.values()
        output = self.outputs[end - 1]
        found = torch.autograd.grad(
            output,
            sources,
            wanted.grad.to(output.device, output.dtype),
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )
        gradients = list(found)
        if self.prompts is not None:
            gradients[1] = gradients[1][start - first : end - first]
        return SpanGradients(gradients, None if wanted.adapter is None else list(weights))


def _lengths(request: Forward) -> int | None:
    return None if request.prompts is None else request.prompts.shape[2]


def record(
    span: Span, request: Forward, room: Callable[[int], bool]
) -> tuple[AutogradPass, list[torch.Tensor], int]:
    """Run a request under autograd.

    Args:
        span: the blocks to run.
        request: what to run through them.
        room: whether so many bytes may be kept; asked whenever their number grows.

    Returns:
        the recorded pass, outputs of modules inside of blocks, how many bytes it keeps.

    Raises:
        NoRoom: ``room`` said no.
    """
    start, end = request.blocks
    meter = _SavedBytes(span.storages, room, (end - start) * NODE_BYTES)
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda tensor: tensor):
        graph, inner = _forward(span, request)
    for output in graph.outputs.values():
        meter.count(output)
    return graph, inner, meter.size


def recompute(span: Span, request: Backward) -> SpanGradients:
    """The gradients that a request wants, by way of a forward pass of its own."""
    graph, _ = _forward(span, request)
    return graph.gradients(request)


def _forward(span: Span, request: Forward) -> tuple[AutogradPass, list[torch.Tensor]]:
    hidden = request.hidden.to(span.device, span.dtype).detach().requires_grad_()
    prompts = request.prompts
    if prompts is not None:
        # Every row's own gradient is wanted, also where the rows share a prompt.
        prompts = prompts.to(span.device, span.dtype).expand(-1, request.rows, -1, -1)
        prompts = prompts.detach().requires_grad_()
    blocks = range(*request.blocks)
    _, *found = span.compute(
        *request.blocks,
        hidden,
        attention_mask=request.attention_mask,
        position_ids=request.position_ids,
        prompts=prompts,
        states=blocks,
        **request.extras(),
    )
    outputs = dict(zip(blocks, found, strict=False))
    return AutogradPass(span, request, hidden, prompts, outputs), found[len(blocks) :]


class _SavedBytes:
    """Counts the storage of what autograd saves, except for that of weights."""

    def __init__(self, weights: frozenset[int], room: Callable[[int], bool], size: int):
        self._seen = set(weights)
        self._room = room
        self.size = size

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count(tensor)
        # As it is, an output would keep the node that made it, and that node keeps the output.
        return tensor.detach()

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._seen:
            return
        self._seen.add(storage.data_ptr())
        self.size += storage.nbytes()
        if not self._room(self.size):
            raise NoRoom
