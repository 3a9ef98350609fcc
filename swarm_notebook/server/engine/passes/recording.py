"""A forward pass that autograd records, and the way back through it.

The base weights never require gradients, so an `AutogradPass` holds only what the gradients of
hidden states, prompts and adapter weights need. It knows the output of every block, so that one
pass serves a backward through any run of its blocks, with the gradients at any boundary.

`record` counts the bytes that autograd saves while it saves them (weights are not counted, shared
storage once; something for its nodes) and breaks off when there is no room. Recording, and going
back, are cut between blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from swarm_notebook.checkpoint.packed import storages
from swarm_notebook.server.engine.passes.gradients import Gathered, SpanGradients
from swarm_notebook.server.engine.passes.stateless import work_of
from swarm_notebook.server.engine.requests import Backward, Forward
from swarm_notebook.server.engine.scheduling.pieces import Pieces
from swarm_notebook.server.engine.scheduling.scheduler import BACKWARD_COST
from swarm_notebook.server.engine.span import Span

# What autograd takes for a block besides tensors, about: with few tokens it is more than they are.
NODE_BYTES = 64 << 10
# A recording is cut between blocks alone, so of longer passes a piece would hold up all others: for
# them a backward computes forward once more. A part of a batch in training has about so many.
MAX_RECORDED = 1024


class NoRoom(Exception):
    """A forward pass would leave more behind than may be kept.

    Attributes:
        size: bytes that it has left until now.
    """

    def __init__(self, size: int):
        super().__init__(f"no room for {size} bytes")
        self.size = size


@dataclass
class AutogradPass:
    """A recorded forward pass.

    Attributes:
        span: the blocks that computed it.
        request: what was computed.
        hidden, prompts: the leaves of the graph, together with the span's adapter weights; of
            prompts one for each block: on its way to one for all, a block's gradient would pass
            all blocks before it.
        outputs: the output of every block, by index.
    """

    span: Span
    request: Forward
    hidden: torch.Tensor
    prompts: list[torch.Tensor] | None
    outputs: dict[int, torch.Tensor]

    @classmethod
    def begin(cls, span: Span, request: Forward) -> AutogradPass:
        """A pass of which no block has run yet."""
        hidden = request.hidden.to(span.device, span.dtype).detach().requires_grad_()
        prompts = None
        if request.prompts is not None:
            # Every row's own gradient is wanted, also where the rows share a prompt.
            given = request.prompts.to(span.device, span.dtype).expand(-1, request.rows, -1, -1)
            prompts = [prompt.detach().requires_grad_() for prompt in given]
        return cls(span, request, hidden, prompts, {})

    def extend(self, start: int, end: int) -> dict[tuple[int, str], torch.Tensor]:
        """Run blocks ``[start, end)``, which are next; gives outputs of modules inside of them."""
        request, span = self.request, self.span
        first, blocks = request.blocks[0], range(start, end)
        wanted = [key for key in request.inner if key[0] in blocks]
        options = request.extras_of_all_blocks()
        if wanted:
            options.update(inner=wanted, inner_bytes=request.inner_bytes)
        prompts = self.prompts
        _, *found = span.compute(
            start,
            end,
            self.hidden if start == first else self.outputs[start - 1],
            attention_mask=request.attention_mask,
            position_ids=request.position_ids,
            prompts=None if prompts is None else prompts[start - first : end - first],
            states=blocks,
            **options,
        )
        self.outputs.update(zip(blocks, found, strict=False))
        return dict(zip(wanted, found[len(blocks) :], strict=True))

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
            return self.stretch(wanted, *wanted.blocks, wanted.grad, keep=keep)
        start, end = wanted.blocks
        found = Gathered(wanted)
        for block in reversed(range(start, end)):
            inside = replace(wanted, states=())
            # Blocks may share what a parameter goes through, so it all stays until the end.
            found.add(self.stretch(inside, block, block + 1, found.grad, keep=True), block)
            if block > start:
                yield BACKWARD_COST * wanted.rows * wanted.length
        return found.result()

    def stretch(
        self, wanted: Backward, start: int, end: int, grad: torch.Tensor, *, keep: bool
    ) -> SpanGradients:
        """The gradients through blocks ``[start, end)`` alone."""
        first = self.request.blocks[0]
        prompts = () if self.prompts is None else self.prompts[start - first : end - first]
        sources = [self.hidden if start == first else self.outputs[start - 1], *prompts]
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
        if prompts:
            gradients[1 : 1 + len(prompts)] = [torch.stack(gradients[1 : 1 + len(prompts)])]
        return SpanGradients(gradients, None if wanted.adapter is None else list(weights))


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
    graph = AutogradPass.begin(span, request)
    inner: dict[tuple[int, str], torch.Tensor] = {}
    first = start
    while first < end:
        last = min(end, first + max(1, room // max(1, request.rows * request.length)))
        with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda tensor: tensor):
            inner.update(graph.extend(first, last))
        for block in range(first, last):
            meter.count(graph.outputs[block])
        done, first = (last - first) * request.rows * request.length, last
        if first < end:
            room = yield done
    return graph, [inner[key] for key in request.inner], meter.size


def _lengths(request: Forward) -> int | None:
    return None if request.prompts is None else request.prompts.shape[2]


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
            raise NoRoom(self.size)
