"""The way back through the hosted blocks where no forward pass was recorded: it is made anew.

All comes in pieces (see `stateless`): groups of rows; where a row is too long, it keeps the input
of every block and its keys and values, and goes back block by block and in each from the last chunk
of positions to the first: the gradients of a chunk's keys and values are what the chunks behind it
have left in them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from swarm_notebook.server.engine.kv.cache import SessionCache
from swarm_notebook.server.engine.passes.gradients import Gathered, SpanGradients
from swarm_notebook.server.engine.passes.recording import AutogradPass
from swarm_notebook.server.engine.passes.stateless import (
    BlockByBlock,
    by_blocks_only,
    chunk_options,
    chunk_size,
    fits,
    group_size,
    rows_of,
    work_of,
)
from swarm_notebook.server.engine.requests import Backward
from swarm_notebook.server.engine.scheduling.pieces import Pieces
from swarm_notebook.server.engine.scheduling.scheduler import BACKWARD_COST
from swarm_notebook.server.engine.span import Span


def recompute(span: Span, request: Backward) -> Pieces[SpanGradients]:
    """The gradients that a request wants, by way of a forward pass of its own."""
    room = (yield 0) // BACKWARD_COST
    if fits(request, room):
        return _at_once(span, request)
    if by_blocks_only(request):
        gradients, _ = yield from _block_by_block(span, request, room)
        return gradients
    groups: list[SpanGradients] = []
    begin = 0
    while begin < request.rows:
        count, whole_blocks = group_size(request, room, request.rows - begin)
        part = rows_of(request, begin, begin + count)
        part.grad = request.grad[begin : begin + count]
        if whole_blocks:
            groups.append(_at_once(span, part))
            done = BACKWARD_COST * work_of(part)
        else:
            found, done = yield from _block_by_block(span, part, room)
            groups.append(found)
        begin += count
        if begin < request.rows:
            room = (yield done) // BACKWARD_COST
    return _joined(request, groups)


def _joined(request: Backward, groups: list[SpanGradients]) -> SpanGradients:
    """The gradients of groups of rows: those of rows side by side, those of weights added up."""
    if len(groups) == 1:
        return groups[0]
    prompted, by_row = request.prompts is not None, 1 + len(request.states)
    joined: list[torch.Tensor] = []
    outer = (group.tensors[: by_row + prompted] for group in groups)
    for index, parts in enumerate(zip(*outer, strict=True)):
        if prompted and index == 1:
            joined.append(torch.cat(parts, dim=1))
        else:
            joined.append(torch.cat(parts))
    names = groups[0].weights
    # By name: a group that went block by block has them from the last block to the first.
    found = [
        dict(zip(group.weights or (), group.tensors[by_row + prompted :], strict=True))
        for group in groups
    ]
    joined += [torch.stack([one[name] for one in found]).sum(0) for name in names or ()]
    return SpanGradients(joined, names)


def _at_once(span: Span, request: Backward) -> SpanGradients:
    graph = AutogradPass.begin(span, request)
    graph.extend(*request.blocks)
    return graph.stretch(request, *request.blocks, request.grad, keep=False)


def _block_by_block(span: Span, request: Backward, room: int) -> Pieces[tuple[SpanGradients, int]]:
    """The gradients of rows that are too long for all blocks at once, and the last piece's work.

    Args:
        room: of the first piece, in positions through one block and back.
    """

    def run(*arguments: Any, **options: Any) -> list[torch.Tensor]:
        # Not in inference mode: autograd may not save what was made there.
        with torch.no_grad():
            return span.compute(*arguments, **options)

    ahead = BlockByBlock(span, replace(request, states=(), inner=()), run, keeps=True)
    done = yield from ahead.forward(room * BACKWARD_COST)
    gathered = Gathered(request)
    for block in reversed(range(*request.blocks)):
        back = _BlockBackward(span, request, block, ahead.inputs.pop(block), gathered.grad)
        back.cache = ahead.caches.pop(block, None)
        while back.left:
            room = (yield done) // BACKWARD_COST
            done = BACKWARD_COST * request.rows * back.chunk(room)
        gathered.add(back.result(), block)
    return gathered.result(), done


class _BlockBackward:
    """The way back through one block, from its last positions to its first.

    Args:
        hidden, grad: the block's input, and the gradient of its output, of all positions.

    Attributes:
        cache: keys and values of all positions; None if they went through the block in one piece.
        left: how many positions are to be done yet.
    """

    cache: SessionCache | None

    def __init__(
        self, span: Span, request: Backward, block: int, hidden: torch.Tensor, grad: torch.Tensor
    ):
        self._span, self._request, self._block = span, request, block
        self._hidden, self._grad = hidden, grad.to(hidden.device, hidden.dtype)
        self._found = torch.empty_like(hidden)
        self._weights = span.adapter_weights(block, block + 1)
        self._sums = [torch.zeros_like(weight) for weight in self._weights.values()]
        self._prompts: torch.Tensor | None = None
        if request.prompts is not None:
            own = request.prompts[block - request.blocks[0]].to(hidden.device, hidden.dtype)
            self._prompts = torch.zeros_like(own.expand(request.rows, -1, -1)).contiguous()
        # The gradients of keys and values, as far as the positions behind have come.
        self._behind: list[torch.Tensor] = []
        self.cache, self.left = None, request.length

    def chunk(self, room: int) -> int:
        """Go back through the next positions, and say how many they were."""
        end = self.left
        size = end if self.cache is None else chunk_size(self._request, room, end)
        begin = self.left = end - size
        options = chunk_options(self._request, self._block, begin, end)
        prompt = self._leaf_prompt(options)
        hidden = self._hidden[:, begin:end].detach().requires_grad_()
        cache = None if self.cache is None else _PastKeys(self.cache, self._block, begin)
        (output,) = self._span.compute(self._block, self._block + 1, hidden, cache=cache, **options)
        past = [] if cache is None else cache.past
        outputs, grads = [output], [self._grad[:, begin:end]]
        if cache is not None:
            self._behind = self._behind or [torch.zeros_like(one) for one in cache.all]
            outputs += cache.new
            grads += [behind[:, :, begin:end] for behind in self._behind]
        sources = [hidden, *prompt, *past, *self._weights.values()]
        found = list(
            torch.autograd.grad(outputs, sources, grads, allow_unused=True, materialize_grads=True)
        )
        self._found[:, begin:end] = found.pop(0)
        if prompt and self._prompts is not None:
            self._prompts[:, begin:end] = found.pop(0)[0]
        for behind in self._behind if past else ():
            behind[:, :, :begin] += found.pop(0)
        for total, own in zip(self._sums, found, strict=True):
            total += own
        return size

    def result(self) -> SpanGradients:
        """When nothing is left."""
        prompts = [] if self._prompts is None else [self._prompts[None]]
        names = None if self._request.adapter is None else list(self._weights)
        return SpanGradients([self._found, *prompts, *self._sums], names)

    def _leaf_prompt(self, options: dict[str, Any]) -> list[torch.Tensor]:
        """The prompts of these positions as a leaf of the graph, if there are any."""
        prompts = options["prompts"]
        if prompts is None or not prompts.shape[2]:
            return []
        own = prompts.to(self._span.device, self._span.dtype)
        own = own.expand(-1, self._request.rows, -1, -1).detach().requires_grad_()
        options["prompts"] = own
        return [own]


class _PastKeys(SessionCache):
    """A block's keys and values before a chunk, as leaves of the graph; the chunk's own are new.

    Attributes:
        all: keys and values of all positions, also those behind the chunk.
        past: of those before it.
        new: of those in it, when the block has run.
    """

    def __init__(self, cache: SessionCache, block: int, begin: int):
        super().__init__(block, block + 1)
        ((keys, values),) = cache.stores()
        self.all = [keys, values]
        self.past = [store[:, :, :begin].detach().requires_grad_() for store in self.all]
        self.new: list[torch.Tensor] = []
        self._lengths = [begin]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.new = [key_states, value_states]
        keys, values = (
            torch.cat([past, new], dim=2) for past, new in zip(self.past, self.new, strict=True)
        )
        return keys, values
