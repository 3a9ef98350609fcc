"""`low_rank.LowRank.added` for the rows of a step at once: two Triton kernels per module.

A row's matrices are read where they lie. The first kernel multiplies a row by the matrix that leads
down, in pieces of its length, so that a few rows keep a card busy too; the second puts the pieces
together, multiplies by the matrix that leads up and adds the module's output. All in float32, and
always in the same order: a row's bits depend neither on its company nor on the largest rank in it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from swarm_notebook.server.adapters import low_rank

_RANKS = tl.constexpr(low_rank.RANKS)
_COLUMNS = tl.constexpr(low_rank.COLUMNS)
_UP = tl.constexpr(low_rank.UP)
_RANK = tl.constexpr(low_rank.RANK)
_HALF = tl.constexpr(low_rank.HALF)
_SCALE = tl.constexpr(low_rank.SCALE)
# Pieces of a row: eight rows by eight pieces are half of an H200's multiprocessors.
_PIECES = tl.constexpr(8)
# Values that a program reads at once: of a row's length, and of the output.
_READ = 256
_WRITTEN = 256


@triton.jit
def _load(address, half, at, mask, like):
    """Values of a matrix at this address, which are float32 or of the dtype of the blocks."""
    if half != 0:
        found = tl.load(
            address.to(tl.pointer_type(like.dtype.element_ty)) + at, mask=mask, other=0.0
        ).to(tl.float32)
    else:
        found = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    return found


@triton.jit(do_not_specialize=["width", "x_row", "each"])
def _down(x, table, sums, width, x_row, each, READ: tl.constexpr):
    row, piece, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = table + row * _COLUMNS
    rank = tl.load(line + _RANK)
    first = group * _RANKS
    if first < rank:
        address, half = tl.load(line), tl.load(line + _HALF)
        ranks, at = first + tl.arange(0, _RANKS), tl.arange(0, READ)
        total = tl.zeros([_RANKS], tl.float32)
        begin = piece * each
        for start in range(begin, tl.minimum(begin + each, width), READ):
            within = start + at < width
            values = tl.load(x + row * x_row + start + at, mask=within, other=0.0)
            places = ranks[:, None] * width + (start + at)[None]
            mask = (ranks < rank)[:, None] & within[None]
            weights = _load(address, half, places, mask, x)
            total += tl.sum(weights * values.to(tl.float32)[None], 1)
        place = ((row * tl.num_programs(2) + group) * _PIECES + piece) * _RANKS
        tl.store(sums + place + tl.arange(0, _RANKS), total)


@triton.jit(do_not_specialize=["width", "known_row", "groups"])
def _up(known, table, sums, result, width, known_row, groups, WRITTEN: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * WRITTEN + tl.arange(0, WRITTEN)
    within = at < width
    line = table + row * _COLUMNS
    rank = tl.load(line + _RANK)
    found = tl.load(known + row * known_row + at, mask=within, other=0.0)
    if rank > 0:
        address, half = tl.load(line + _UP), tl.load(line + _HALF)
        scale = tl.load(line + _SCALE).to(tl.int32).to(tl.float32, bitcast=True)
        added = tl.zeros([WRITTEN], tl.float32)
        for group in range(tl.cdiv(rank, _RANKS)):
            ranks = group * _RANKS + tl.arange(0, _RANKS)
            pieces = (row * groups + group) * _PIECES + tl.arange(0, _PIECES)
            places = pieces[:, None] * _RANKS + tl.arange(0, _RANKS)[None]
            inner = tl.sum(tl.load(sums + places), 0)
            places = at[:, None] * rank + ranks[None]
            mask = within[:, None] & (ranks < rank)[None]
            weights = _load(address, half, places, mask, known)
            added += tl.sum(weights * inner[None], 1)
        found = (found.to(tl.float32) + added * scale).to(known.dtype.element_ty)
    tl.store(result + row * width + at, found, mask=within)


def add(x: torch.Tensor, known: torch.Tensor, table: torch.Tensor, ranks: int) -> torch.Tensor:
    """A module's output with what the rows' adapters add.

    Args:
        x: ``[rows, input size]``.
        known: ``[rows, output size]``, the output without adapters.
        table: ``[rows, low_rank.COLUMNS]``.
        ranks: the largest in it, or more: a multiple of `low_rank.RANKS`.
    """
    (rows, width), size = x.shape, known.shape[1]
    groups = ranks // low_rank.RANKS
    pieces = int(_PIECES)
    each = triton.cdiv(width, pieces * _READ) * _READ
    sums = torch.empty(
        rows * groups * pieces * low_rank.RANKS, dtype=torch.float32, device=x.device
    )
    result = torch.empty(rows, size, dtype=known.dtype, device=known.device)
    _down[rows, pieces, groups](x, table, sums, width, x.stride(0), each, READ=_READ)
    _up[rows, triton.cdiv(size, _WRITTEN)](
        known, table, sums, result, size, known.stride(0), groups, WRITTEN=_WRITTEN
    )
    return result
