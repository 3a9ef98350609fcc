"""A pass without a cache in another dtype than the server computes in.

A notebook compares what one server has answered with what another one makes of the same input; in
float32 the rounding of the second does not hide what the first did. The weights stay those that
this server holds: block by block they are copied in the dtype asked for, used and let go, so that
it takes the memory of one block. A block is one piece of work (`pieces`): its copy never waits
while others have their turn, however many ask.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from swarm_notebook.server.engine import stateless
from swarm_notebook.server.engine.pieces import Pieces, run_whole
from swarm_notebook.server.engine.requests import Forward
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
        prompts = request.prompts
        of_block = replace(
            request,
            blocks=(block, block + 1),
            hidden=hidden,
            states=(),
            prompts=None if prompts is None else prompts[block - start : block - start + 1],
        )
        hidden = run_whole(stateless.forward(_cast(span, block, dtype), of_block), room)[0]
        if block in request.states:
            states[block] = hidden
        if block < end - 1:
            room = yield stateless.work_of(of_block)
    return [hidden, *(states[block] for block in request.states)]


def _cast(span: Span, block: int, dtype: torch.dtype) -> Span:
    """One block alone, its weights copied in ``dtype``."""
    layer = copy.deepcopy(span.layer(block))
    for module in layer.modules():
        # What multiplies faster (`products`) does so by the weights as they are.
        if isinstance(module, nn.Linear):
            vars(module).pop("forward", None)
    decoder = span.decoder_around(block, [layer.to(dtype)])
    return Span(decoder, span.layers_name, block)
