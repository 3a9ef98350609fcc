"""A pass without a cache, and the way back through one, in another dtype than the server's.

A notebook compares what one server has answered with what another one makes of the same input; in
float32 the rounding of the second does not hide what the first did. The weights stay those that
this server holds: block by block they are copied in the dtype asked for, used and let go, so that
it takes the memory of one block. A block is one piece of work (`pieces`): its copy never waits
while others have their turn, however many ask.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from swarm_notebook.checkpoint.packed import PackedWeight
from swarm_notebook.server.engine.passes import backward, stateless
from swarm_notebook.server.engine.passes.gradients import Gathered, SpanGradients
from swarm_notebook.server.engine.requests import Backward, Forward
from swarm_notebook.server.engine.scheduling.pieces import Pieces, run_whole
from swarm_notebook.server.engine.scheduling.scheduler import BACKWARD_COST
from swarm_notebook.server.engine.span import Span


def forward(span: Span, request: Forward, dtype: torch.dtype) -> Pieces[list[torch.Tensor]]:
    """The outputs of a pass as blocks of ``dtype`` give them, on the CPU.

    Returns:
        ``[rows, positions, hidden size]`` of ``dtype`` for the last block, then for the states.
    """
    room = yield 0
    hidden, states = request.hidden, {}
    start, end = request.blocks
    for block in range(start, end):
        of_block = _of_block(request, block, hidden)
        hidden = run_whole(stateless.forward(_cast(span, block, dtype), of_block), room)[0]
        if block in request.states:
            states[block] = hidden
        if block < end - 1:
            room = yield stateless.work_of(of_block)
    return [hidden, *(states[block] for block in request.states)]


def gradients(span: Span, request: Backward, dtype: torch.dtype) -> Pieces[SpanGradients]:
    """The gradients of a pass as blocks of ``dtype`` give them (see `SpanGradients`), on the CPU.

    The input of every block is computed first; the way back takes one block after the other.
    """
    room = yield 0
    start, end = request.blocks
    inputs, hidden = {}, request.hidden
    for block in range(start, end):
        inputs[block] = hidden
        if block < end - 1:
            ahead = _of_block(request, block, hidden)
            found = run_whole(stateless.forward(_cast(span, block, dtype), ahead), room)
            # A copy: autograd may not save what was made in inference mode.
            hidden = found[0].clone()
            room = yield stateless.work_of(ahead)
    gathered = Gathered(request)
    for block in reversed(range(start, end)):
        back = replace(_of_block(request, block, inputs.pop(block)), grad=gathered.grad)
        given = run_whole(backward.recompute(_cast(span, block, dtype), back), room)
        gathered.add(SpanGradients([one.cpu() for one in given.tensors], given.weights), block)
        if block > start:
            room = yield BACKWARD_COST * stateless.work_of(back)
    return gathered.result()


F = TypeVar("F", bound=Forward)


def _of_block(request: F, block: int, hidden: torch.Tensor) -> F:
    """The share of one block, whose input is ``hidden``."""
    prompts, index = request.prompts, block - request.blocks[0]
    return replace(
        request,
        blocks=(block, block + 1),
        hidden=hidden,
        states=(),
        prompts=None if prompts is None else prompts[index : index + 1],
    )


class _CastSpan(Span):
    """One block alone, in another dtype.

    Args:
        weights: the parameters of the adapter in it, by name.
    """

    def __init__(
        self, decoder: nn.Module, layers_name: str, block: int, weights: dict[str, nn.Parameter]
    ):
        super().__init__(decoder, layers_name, block)
        self._weights = weights

    def adapter_weights(self, start: int, end: int) -> dict[str, nn.Parameter]:
        return self._weights if start <= self.start < end else {}


def _cast(span: Span, block: int, dtype: torch.dtype) -> Span:
    """One block alone, its weights copied in ``dtype``; what is packed, as its bits say it."""
    copied: dict[int, Any] = {
        id(weight): nn.Parameter(weight.packed.unpack(dtype), requires_grad=False)
        for weight in span.layer(block).parameters()
        if isinstance(weight, PackedWeight)
    }
    layer = copy.deepcopy(span.layer(block), copied)
    weights = {
        name: copied[id(parameter)]
        for name, parameter in span.adapter_weights(block, block + 1).items()
    }
    for module in layer.modules():
        # What multiplies faster (`products.kernels`) does so by the weights as they are.
        if isinstance(module, nn.Linear):
            vars(module).pop("forward", None)
    decoder = span.decoder_around(block, [layer.to(dtype)])
    return _CastSpan(decoder, span.layers_name, block, weights)
