"""Gradients through the hosted blocks: a forward pass that autograd recorded, and the way back.

The base weights never require gradients, so an `AutogradPass` holds only what the gradients of
hidden states, prompts and adapter weights need. It knows the output of every block, so that one
pass serves a backward through any run of its blocks, with the gradients at any boundary.

`record` counts the bytes that autograd saves while it saves them (weights are not counted, shared
storage once; something for its nodes) and breaks off when there is no room.

All comes in pieces (see `stateless`). Recording and a way back through what was recorded are cut
between blocks. `recompute` takes groups of rows; where a row is too long, it keeps the input of
every block and its keys and values, and goes back block by block and in each from the last chunk of
positions to the first: the gradients of a chunk's keys and values are what the chunks behind it
have left in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from swarm_notebook.checkpoint.packed import storages
from swarm_notebook.server.engine.kv.cache import SessionCache
from swarm_notebook.server.engine.passes.stateless import (
    BlockByBlock,
    by_blocks_only,
    chunk_options,
    fits,
    group_size,
    rows_of,
    work_of,
)
from swarm_notebook.server.engine.requests import Backward, Forward
from swarm_notebook.server.engine.scheduling.pieces import Pieces
from swarm_notebook.server.engine.scheduling.scheduler import BACKWARD_COST, MAX_CHUNK
from swarm_notebook.server.engine.span import Span

# What autograd takes for a block besides tensors, about: with few tokens it is more than they are.
NODE_BYTES = 64 << 10
# A recording is cut between blocks alone, so of longer passes a piece would hold up all others: for
# them a backward computes forward once more. A part of a batch in training has about so many.
MAX_RECORDED = 1024


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
            and (made.adapter, made.seed, made.by_row)
            == (wanted.adapter, wanted.seed, wanted.by_row)
        )

    def gradients(self, wanted: Backward, *, keep: bool = False) -> Pieces[SpanGradients]:
        """The gradients that a backward request wants.

        Args:
            wanted: a request that this graph serves.
            keep: whether the graph is needed again.
        """
        room = yield 0
        if BACKWARD_COST * work_of(wanted) <= room:
            return self._stretch(wanted, *wanted.blocks, wanted.grad, keep=keep)
        start, end = wanted.blocks
        found = Gathered(wanted)
        for block in reversed(range(start, end)):
            inside = replace(wanted, states=())
            # Blocks may share a node, that of the prompts, so it all stays until the end.
            found.add(self._stretch(inside, block, block + 1, found.grad, keep=True), block)
            if block > start:
                yield BACKWARD_COST * wanted.rows * wanted.length
        return found.result()

    def _stretch(
        self, wanted: Backward, start: int, end: int, grad: torch.Tensor, *, keep: bool
    ) -> SpanGradients:
        """The gradients through blocks ``[start, end)`` alone."""
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
            grad.to(output.device, output.dtype),
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )
        gradients = list(found)
        if self.prompts is not None:
            gradients[1] = gradients[1][start - first : end - first]
        return SpanGradients(gradients, None if wanted.adapter is None else list(weights))


@dataclass
class Gathered:
    """Gradients of a request that come block by block, from the last one on.

    Attributes:
        grad: that of the output of the block which is next.
    """

    wanted: Backward
    grad: torch.Tensor = field(init=False)
    _prompts: list[torch.Tensor] = field(default_factory=list)
    _states: dict[int, torch.Tensor] = field(default_factory=dict)
    _weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.grad = self.wanted.grad

    def add(self, found: SpanGradients, block: int) -> None:
        """What one block has given: of its input, its prompts, its weights."""
        self.grad, *rest = found.tensors
        if self.wanted.prompts is not None:
            self._prompts.append(rest.pop(0))
        self._weights.update(zip(found.weights or (), rest, strict=True))
        if block - 1 in self.wanted.states:
            self._states[block - 1] = self.grad

    def result(self) -> SpanGradients:
        """As one for all blocks."""
        prompts = [torch.cat(self._prompts[::-1])] if self._prompts else []
        states = [self._states[block] for block in self.wanted.states]
        names = None if self.wanted.adapter is None else list(self._weights)
        gradients = [self.grad, *prompts, *states, *self._weights.values()]
        return SpanGradients(gradients, names)


def _lengths(request: Forward) -> int | None:
    return None if request.prompts is None else request.prompts.shape[2]


def record(
    span: Span, request: Forward, may_keep: Callable[[int], bool]
) -> Pieces[tuple[AutogradPass, list[torch.Tensor], int] | None]:
    """Run a request under autograd; None if it is too long to be cut so coarsely.

    Args:
        span: the blocks to run.
        request: what to run through them.
        may_keep: whether so many bytes may be kept; asked whenever their number grows.

    Returns:
        the recorded pass, outputs of modules inside of blocks, how many bytes it keeps.

    Raises:
        NoRoom: ``may_keep`` said no.
    """
    room = yield 0
    start, end = request.blocks
    if request.rows * request.length > max(room, MAX_RECORDED):
        return None
    meter = _SavedBytes(span.storages, may_keep, (end - start) * NODE_BYTES)
    graph = _begin(span, request)
    inner: dict[tuple[int, str], torch.Tensor] = {}
    first = start
    while first < end:
        last = min(end, first + max(1, room // max(1, request.rows * request.length)))
        with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda tensor: tensor):
            inner.update(_extend(graph, first, last))
        for block in range(first, last):
            meter.count(graph.outputs[block])
        done, first = (last - first) * request.rows * request.length, last
        if first < end:
            room = yield done
    return graph, [inner[key] for key in request.inner], meter.size


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
    for index, parts in enumerate(zip(*(group.tensors for group in groups), strict=True)):
        if prompted and index == 1:
            joined.append(torch.cat(parts, dim=1))
        elif index < by_row + prompted:
            joined.append(torch.cat(parts))
        else:
            joined.append(torch.stack(parts).sum(0))
    return SpanGradients(joined, groups[0].weights)


def _at_once(span: Span, request: Backward) -> SpanGradients:
    graph = _begin(span, request)
    _extend(graph, *request.blocks)
    return graph._stretch(request, *request.blocks, request.grad, keep=False)


def _begin(span: Span, request: Forward) -> AutogradPass:
    """A pass of which no block has run yet."""
    hidden = request.hidden.to(span.device, span.dtype).detach().requires_grad_()
    prompts = request.prompts
    if prompts is not None:
        # Every row's own gradient is wanted, also where the rows share a prompt.
        prompts = prompts.to(span.device, span.dtype).expand(-1, request.rows, -1, -1)
        prompts = prompts.detach().requires_grad_()
    return AutogradPass(span, request, hidden, prompts, {})


def _extend(graph: AutogradPass, start: int, end: int) -> dict[tuple[int, str], torch.Tensor]:
    """Run blocks ``[start, end)``, which are next; gives outputs of modules inside of them."""
    request, span = graph.request, graph.span
    first, blocks = request.blocks[0], range(start, end)
    wanted = [key for key in request.inner if key[0] in blocks]
    options = request.extras_of_all_blocks()
    if wanted:
        options.update(inner=wanted, inner_bytes=request.inner_bytes)
    prompts = graph.prompts
    _, *found = span.compute(
        start,
        end,
        graph.hidden if start == first else graph.outputs[start - 1],
        attention_mask=request.attention_mask,
        position_ids=request.position_ids,
        prompts=None if prompts is None else prompts[start - first : end - first],
        states=blocks,
        **options,
    )
    graph.outputs.update(zip(blocks, found, strict=False))
    return dict(zip(wanted, found[len(blocks) :], strict=True))


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
        end, rows = self.left, self._request.rows
        size = end if self.cache is None else min(max(1, room // rows), end, MAX_CHUNK)
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
        for storage in storages(tensor):
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.size += storage.nbytes()
        if not self._room(self.size):
            raise NoRoom
