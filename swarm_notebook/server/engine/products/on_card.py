"""Multiplying by packed weights on a GPU, inside of graphs and of blocks that torch compiles.

`packed_kernel` has the kernels. How a product is shared out, and up to how many tokens it is faster
than unpacking, is measured once per shape and grid; before that it is compared with the product of
the unpacked weight. Without Triton, or where a comparison fails, weights are unpacked.

For whoever traces blocks, products and unpacking are operators of torch, so that compiled blocks
call them as they are. To call an operator of one's own takes longer than its kernel, so all others
call the kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from swarm_notebook.checkpoint.packed import Grid, PackedGrid

if TYPE_CHECKING:
    from swarm_notebook.server.engine.products.packed_kernel import Tiling

logger: logging.Logger = logging.getLogger(__name__)

# Tokens of which it is measured whether a kernel is faster than unpacking. Each is compiled anew,
# which takes a second or two.
_SIZES = (1, 16, 32, 64)
# Ways to share out a product, as the fields of `Tiling`: of one token at 4 or 8 bits, and of all
# others, for which the shape of a program is chosen by the fewest tokens. Those of others are what
# was fastest on an H200 for some matrix of an 8B Llama; no other card was tried.
_OF_ONE = [(8, 4, 1, 0), (8, 2, 1, 0), (4, 4, 1, 0), (8, 8, 1, 0)]
_OF_MANY = [(rows, 4, 4, fill) for rows in (64, 128) for fill in (2, 4, 8)]
# Below four bits tiles of more tokens or rows do not fit into a multiprocessor's memory.
_MOST_OF_FEW, _ROWS_OF_FEW = 32, 64
# Measured over weights of so many bytes: what fits into a card's cache says nothing.
_SPREAD_BYTES = 256 << 20
_REPLAYS, _TRIES = 3, 3
# How far a product may be from that of the unpacked weight, relative to it: bfloat16 has 8 bits.
_CLOSE = 2e-2

_tilings: dict[tuple[Grid, torch.Size, int], Tiling] = {}


def _kernels() -> Any:
    # Triton comes with torch for GPUs only.
    from swarm_notebook.server.engine.products import packed_kernel

    return packed_kernel


def arranged(packed: PackedGrid) -> PackedGrid:
    """With scales of one group side by side, as a program reads them."""
    scales, offsets = packed.scales.t().contiguous().t(), packed.offsets
    return replace(
        packed,
        scales=scales,
        offsets=None if offsets is None else offsets.t().contiguous().t(),
    )


def multiply(x: torch.Tensor, packed: PackedGrid) -> torch.Tensor:
    """``[tokens, rows]`` for ``[tokens, columns]``, where `choose` has found a way."""
    if type(x) is torch.Tensor:
        return _multiplied(x, packed)
    found: torch.Tensor = _multiply(x, *_parts(packed))
    return found


def _multiplied(x: torch.Tensor, packed: PackedGrid) -> torch.Tensor:
    kernels = _kernels()
    tiling = _tilings[packed.grid, packed.shape, kernels.bucket(x.shape[0])]
    found: torch.Tensor = kernels.multiply(x, packed, tiling)
    return found


def unpack(packed: PackedGrid, dtype: torch.dtype) -> torch.Tensor:
    """What `PackedGrid.unpack` gives, to the bit."""
    if type(packed.scales) is torch.Tensor:
        unpacked: torch.Tensor = _kernels().unpack(packed, dtype)
        return unpacked
    found: torch.Tensor = _unpack(*_parts(packed), columns=packed.shape[1], dtype=dtype)
    return found


def _parts(packed: PackedGrid) -> tuple[Any, ...]:
    """What operators of torch can be given."""
    grid = [packed.grid.bits, packed.grid.group]
    return list(packed.planes), packed.scales, packed.offsets, grid


@torch.library.custom_op("swarm_notebook::multiply_packed", mutates_args=())
def _multiply(
    x: torch.Tensor,
    planes: list[torch.Tensor],
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    grid: list[int],
) -> torch.Tensor:
    shape = torch.Size((scales.shape[0], x.shape[1]))
    packed = PackedGrid(Grid(*grid), shape, tuple(planes), scales, offsets)
    return _multiplied(x, packed)


@_multiply.register_fake
def _(
    x: torch.Tensor, _planes: list[torch.Tensor], scales: torch.Tensor, *_: object
) -> torch.Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])


@torch.library.custom_op("swarm_notebook::unpack_packed", mutates_args=())
def _unpack(
    planes: list[torch.Tensor],
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    grid: list[int],
    *,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    shape = torch.Size((scales.shape[0], columns))
    packed = PackedGrid(Grid(*grid), shape, tuple(planes), scales, offsets)
    found: torch.Tensor = _kernels().unpack(packed, dtype)
    return found


@_unpack.register_fake
def _(
    _planes: list[torch.Tensor],
    scales: torch.Tensor,
    *_: object,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return scales.new_empty(scales.shape[0], columns, dtype=dtype)


def unpacks(packed: PackedGrid, dtype: torch.dtype) -> bool:
    """Whether `unpack` can be had for a weight, and gives what it must."""
    if len(packed.shape) != 2:
        return False
    try:
        kernels = _kernels()
        if kernels.tile_of(packed) < kernels.LEAST:
            return False
        return torch.equal(unpack(packed, dtype), packed.unpack(dtype))
    except Exception as error:  # whatever a compiler does on a machine that it does not know
        logger.info("packed weights are unpacked without a kernel: %s", error)
        return False


@torch.inference_mode()
def choose(alike: Sequence[PackedGrid], dtype: torch.dtype) -> int:
    """Up to how many tokens `multiply` is to be used for weights of one shape and grid.

    Args:
        alike: weights for which `unpacks` is true.

    Returns:
        0 if it cannot be had, or unpacking is faster.
    """
    if dtype != torch.bfloat16:
        return 0
    try:
        return _measured(alike, dtype)
    except Exception as error:  # as in `unpacks`
        logger.info("packed weights are unpacked for each product: %s", error)
        return 0


def ways(packed: PackedGrid, tokens: int) -> list[Tiling]:
    """How the product of so many tokens may be shared out; none if there is no room for it."""
    few = packed.grid.bits < 4
    if few and tokens > _MOST_OF_FEW:
        return []
    shares = _OF_ONE if tokens == 1 and not few else _OF_MANY
    found = [_kernels().Tiling(*share) for share in shares]
    return [way for way in found if way.rows == _ROWS_OF_FEW] if few else found


def _measured(alike: Sequence[PackedGrid], dtype: torch.dtype) -> int:
    kernels, one, up_to = _kernels(), alike[0], 0
    sample = alike[: max(1, _SPREAD_BYTES // one.nbytes)]
    rows: int | None = None
    for tokens in _SIZES:
        x = _noise(tokens, one.shape[1]).to(one.device, dtype)
        key = one.grid, one.shape, kernels.bucket(tokens)
        seconds = {}
        for way in ways(one, tokens):
            if rows is not None and way.rows != rows:
                continue
            _tilings[key] = way
            try:
                _compare(x, one)
                seconds[way] = _seconds(multiply, x, sample)
            except Exception as error:  # as in `unpacks`; another way may do
                logger.info("%s for %d tokens: %s", way, tokens, error)
        if not seconds:
            break
        best = min(seconds, key=seconds.__getitem__)
        _tilings[key] = best
        unpacked = _seconds(_unpacked, x, sample)
        logger.info(
            "%d tokens by %s, %d bits in groups of %d: %.1f us by %s, unpacked %.1f us",
            tokens,
            list(one.shape),
            one.grid.bits,
            one.grid.group,
            1e6 * seconds[best],
            best,
            1e6 * unpacked,
        )
        if seconds[best] > unpacked:
            break
        up_to = kernels.bucket(tokens)
        if best.fill:  # of a product of several tokens: what is best for few is for more
            rows = best.rows
    return up_to


def _unpacked(x: torch.Tensor, packed: PackedGrid) -> torch.Tensor:
    return functional.linear(x, unpack(packed, x.dtype))


def _compare(x: torch.Tensor, packed: PackedGrid) -> None:
    """Raise if a product is not that of the unpacked weight."""
    found = multiply(x, packed).float()
    expected = x.float() @ packed.unpack(x.dtype).float().t()
    difference = (found - expected).abs().max() / expected.abs().max()
    if not difference <= _CLOSE:
        raise ArithmeticError(f"products differ by {float(difference):.1e}")


def _noise(*shape: int) -> torch.Tensor:
    # Of its own generator: who shares the process draws the random numbers it would draw alone.
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _seconds(
    product: Callable[[torch.Tensor, PackedGrid], torch.Tensor],
    x: torch.Tensor,
    sample: Sequence[PackedGrid],
) -> float:
    """Of a card, for one product; those with all weights are launched at once."""

    def work() -> None:
        for packed in sample:
            product(x, packed)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    found = []
    for _ in range(_TRIES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000 / _REPLAYS / len(sample))
    return min(found)
