"""A pass without a cache, in pieces (`pieces`), so that others have their turn in between.

Rows do not know of each other, so a batch is cut into groups of rows first, each through all
blocks at once. What is too long for that, down to a single row, goes block by block, and through
each block in chunks of positions with a cache of this block alone: that is how a session takes a
long prompt, and as exact. Memory is that of two hidden states and one block's keys and values,
however long the pass, and no mask is ever larger than a chunk's.

Four kinds of pass are cut between blocks only: with modules captured inside of blocks, whose
outputs may have any form; with dropout in an adapter, which draws once for all rows of a block;
with an adapter whose layers are told something row by row; and with positions of their own but no
mask, which may be several sequences in one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from swarm_notebook.server.engine.kv.cache import SessionCache
from swarm_notebook.server.engine.requests import Forward
from swarm_notebook.server.engine.scheduling.pieces import Pieces
from swarm_notebook.server.engine.scheduling.scheduler import MAX_CHUNK
from swarm_notebook.server.engine.span import Span

# Positions of a row that go through all blocks at once, however much room there is: attention grows
# with their square, which the room of a pass does not know of.
MAX_AT_ONCE = 1024
# Of a chunk and a head: its positions by all keys. A mask of so many takes 16 MiB; one of 1,024
# positions of a row of 16,384 took 64 MiB that no budget knows of, on the way back as well.
MAX_SCORES = 1 << 22

F = TypeVar("F", bound=Forward)


def work_of(request: Forward) -> int:
    """How much a forward pass has, in the unit of `Task.work`."""
    return request.rows * request.length * (request.blocks[1] - request.blocks[0])


def fits(request: Forward, room: int) -> bool:
    """Whether a pass may be one piece."""
    short = request.length <= MAX_AT_ONCE or by_blocks_only(request)
    return work_of(request) <= room and short


def by_blocks_only(request: Forward) -> bool:
    """Whether a pass may be cut between blocks only; see the module."""
    # Without a mask transformers looks for sequences packed in one row, in all of its positions.
    packed = request.position_ids is not None and request.attention_mask is None
    whole = request.seed is not None or request.by_row is not None
    return bool(request.inner) or whole or packed


def rows_of(request: F, begin: int, end: int) -> F:
    """The request for some of its rows."""
    ids, prompts, mask = request.position_ids, request.prompts, request.attention_mask
    return replace(
        request,
        hidden=request.hidden[begin:end],
        prompts=prompts if prompts is None or prompts.shape[1] == 1 else prompts[:, begin:end],
        attention_mask=None if mask is None else mask[begin:end],
        position_ids=ids if ids is None or ids.shape[0] == 1 else ids[begin:end],
        # The longest row may be another one.
        rotary_length=request.turning_length(),
    )


def forward(span: Span, request: Forward) -> Pieces[list[torch.Tensor]]:
    """The outputs of a pass, on the CPU: as `Span.compute` gives them for the whole."""
    room = yield 0
    if fits(request, room):
        return [output.cpu() for output in _at_once(request, span.run)]
    if by_blocks_only(request):
        run = BlockByBlock(span, request, span.run)
        yield from run.forward(room)
        return run.results()
    outputs: list[torch.Tensor] = []
    begin = 0
    while begin < request.rows:
        count, whole_blocks = group_size(request, room, request.rows - begin)
        part = rows_of(request, begin, begin + count)
        if whole_blocks:
            found = [output.cpu() for output in _at_once(part, span.run)]
            done = work_of(part)
        else:
            run = BlockByBlock(span, part, span.run)
            done = yield from run.forward(room)
            found = run.results()
        if not outputs:
            outputs = [out.new_empty(request.rows, *out.shape[1:]) for out in found]
        for whole, own in zip(outputs, found, strict=True):
            whole[begin : begin + count] = own
        begin += count
        if begin < request.rows:
            room = yield done
    return outputs


def group_size(request: Forward, room: int, left: int) -> tuple[int, bool]:
    """How many of the rows that are left to take next, and whether through all blocks at once."""
    of_row = work_of(request) // request.rows
    through_all = of_row <= room and request.length <= MAX_AT_ONCE
    return min(max(1, room // (of_row if through_all else request.length)), left), through_all


def chunk_size(request: Forward, room: int, left: int) -> int:
    """How many of the positions that are left to take next through one block."""
    scores = MAX_SCORES // (request.rows * request.length)
    return min(max(1, min(room // request.rows, scores)), left, MAX_CHUNK)


Run = Callable[..., list[torch.Tensor]]


def _at_once(request: Forward, run: Run) -> list[torch.Tensor]:
    return run(
        *request.blocks,
        request.hidden,
        attention_mask=request.attention_mask,
        position_ids=request.position_ids,
        prompts=request.prompts,
        states=request.states,
        **request.extras(),
    )


@dataclass
class BlockByBlock:
    """A pass that goes through one block after the other, and through each in chunks.

    Args:
        keeps: keep what a backward needs: every block's input, and its keys and values.

    Attributes:
        inputs, caches: of every block by index, if kept; a block that was not cut has no cache.
    """

    span: Span
    request: Forward
    run: Run
    keeps: bool = False
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    caches: dict[int, SessionCache] = field(default_factory=dict)
    _states: dict[int, torch.Tensor] = field(default_factory=dict)
    _inner: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    def forward(self, room: int) -> Pieces[int]:
        """All pieces of it; the first may have ``room``. Returns how much the last one had."""
        request, done = self.request, 0
        hidden = request.hidden.to(self.span.device, self.span.dtype)
        last = request.blocks[1] - 1
        for block in range(*request.blocks):
            if self.keeps:
                self.inputs[block] = hidden
            out = torch.empty_like(hidden)
            cache = SessionCache(block, block + 1)
            cache.restart(request.rows)
            cache.reserve(request.length)
            begin = 0
            while begin < request.length:
                size = self._chunk(room, request.length - begin)
                self._run_chunk(block, hidden, out, cache, (begin, begin + size))
                begin, done = begin + size, size * request.rows
                if block < last or begin < request.length:
                    room = yield done
            if self.keeps and not cache.empty:
                self.caches[block] = cache
            if block in request.states or block == last:
                self._states[block] = out.cpu()
            hidden = out
        return done

    def results(self) -> list[torch.Tensor]:
        """What `Span.compute` gives for the whole, on the CPU."""
        last = self.request.blocks[1] - 1
        states = [self._states[block] for block in (last, *self.request.states)]
        return [*states, *(self._inner[key] for key in self.request.inner)]

    def _inner_left(self) -> int | None:
        if self.request.inner_bytes is None:
            return None
        had = sum(output.numel() * output.itemsize for output in self._inner.values())
        return self.request.inner_bytes - had

    def _chunk(self, room: int, left: int) -> int:
        if by_blocks_only(self.request):
            return left
        return chunk_size(self.request, room, left)

    def _run_chunk(
        self,
        block: int,
        hidden: torch.Tensor,
        out: torch.Tensor,
        cache: SessionCache,
        positions: tuple[int, int],
    ) -> None:
        begin, end = positions
        whole = end - begin == self.request.length
        inner = [key for key in self.request.inner if key[0] == block]
        found = self.run(
            block,
            block + 1,
            hidden[:, begin:end],
            cache=None if whole else cache,
            **chunk_options(self.request, block, begin, end),
            **({"inner": inner, "inner_bytes": self._inner_left()} if inner else {}),
        )
        with torch.no_grad():
            out[:, begin:end] = found[0]
        for key, output in zip(inner, found[1:], strict=True):
            self._inner[key] = output.cpu()


def chunk_options(request: Forward, block: int, begin: int, end: int) -> dict[str, Any]:
    """What `Span.compute` is told of positions ``[begin, end)`` in one block."""
    mask, ids, prompts = request.attention_mask, request.position_ids, request.prompts
    first = block - request.blocks[0]
    return {
        "attention_mask": None if mask is None else mask[:, :end],
        "position_ids": None if ids is None else ids[:, begin:end],
        # They belong to the first positions.
        "prompts": None if prompts is None else prompts[first : first + 1, :, begin:end],
        **request.extras_of_all_blocks(),
        "rotary_length": request.turning_length(),
    }
