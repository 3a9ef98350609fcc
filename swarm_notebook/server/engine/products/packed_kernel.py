"""Products with weights in few bits on a GPU, and their unpacking: two Triton kernels.

Products of one token have another (`token_kernel`). With a few tokens the time of a product goes
into reading the weight, so it is read as its bits are: each program takes some rows of the weight
and a part of its columns, makes values of a tile in registers, rounded to the dtype as
`Packed.unpack` rounds them, and multiplies them on the tensor cores. Matrices of one block have too
few rows to keep a card busy, so columns are shared out, too (*splits*); the program that ends last
adds up what the others have left. In the order of columns: a row's bits do not depend on which one
that is, and the number of splits follows from the weight and the bucket of tokens alone.

Integers lie in their bytes as `checkpoint.packed.spread` reads them: the lowest bits of all bytes
are the first columns. So a tile of bytes is a tile of columns for each *part* of a byte, and all
columns of a tile have one scale, as long as tiles are no longer than groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from swarm_notebook.checkpoint.packed import PackedGrid
from swarm_notebook.server.engine import card_kernel
from swarm_notebook.server.engine.card_kernel import wait_and_be_followed
from swarm_notebook.server.engine.products import token_kernel
from swarm_notebook.server.engine.products.token_kernel import assembles, group_of

# Integers in a byte of the plane that has the fewest bits.
_PARTS = {2: 4, 3: 8, 4: 2, 8: 1}
# What tensor cores multiply at least, and a tile's columns at most.
LEAST, _WIDEST = 16, 128
# Bytes that are read ahead for one program: two of them fit into a multiprocessor.
_AHEAD = 96 << 10
# Row blocks of a weight, for each of which somebody counts its splits.
_MOST_BLOCKS = 1 << 15

# Four bytes to eight bfloat16: 128 + integer has the integer in its lowest bits. Then 136 is taken
# off, which is exact, and scale and offset come in one rounding.
_FOUR_BITS = tl.constexpr("""
{
.reg .b32 a, b, c, d, one, less;
mov.b32 one, 0x3F803F80;
mov.b32 less, 0xC308C308;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.u32 c, a, 4;
shr.u32 d, b, 4;
lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 a, a, one, less;
fma.rn.bf16x2 b, b, one, less;
fma.rn.bf16x2 c, c, one, less;
fma.rn.bf16x2 d, d, one, less;
fma.rn.bf16x2 $0, a, $5, $7;
fma.rn.bf16x2 $1, b, $6, $8;
fma.rn.bf16x2 $2, c, $9, $11;
fma.rn.bf16x2 $3, d, $10, $12;
}
""")


@dataclass(frozen=True)
class Tiling:
    """How a product is shared out.

    Attributes:
        rows: of the weight, for one program.
        warps, stages: of a program, and the tiles that it reads ahead.
        fill: programs per multiprocessor that columns are shared out for; 0: they are not, and
            there is one token, at 4 or 8 bits.
    """

    rows: int
    warps: int
    stages: int
    fill: int


@triton.jit
def _values(low, other, high, part: tl.constexpr, BITS: tl.constexpr):
    """The integers of one part of some bytes, around zero."""
    if BITS == 8:
        found = low.to(tl.float32)
    elif BITS == 3:
        if part % 2 == 0:  # noqa: SIM108 (Triton decides it while it compiles)
            two = (low >> (2 * (part // 2))) & 3
        else:
            two = (other >> (2 * (part // 2))) & 3
        found = (two | (((high >> part) & 1) << 2)).to(tl.float32) - 4.0
    else:
        half = 1 << (BITS - 1)
        found = ((low >> (part * BITS)) & (2 * half - 1)).to(tl.float32) - half
    return found


@triton.jit
def _scale(scales, offsets, row, group, scale_row, scale_group, rows, BITS: tl.constexpr):
    """Scales and offsets of some rows, in one group."""
    at = row * scale_row + group * scale_group
    scale = tl.load(scales + at, mask=row < rows, other=0.0)
    offset = scale
    if BITS != 8:
        offset = tl.load(offsets + at, mask=row < rows, other=0.0)
    return scale, offset


@triton.jit
def _weights(values, scale, offset, BITS: tl.constexpr):
    found = values * scale.to(tl.float32)[:, None]
    if BITS != 8:
        found = found + offset.to(tl.float32)[:, None]
    return found


@triton.jit
def _bytes(plane, high, row, at, rows, columns, BITS: tl.constexpr, PARTS: tl.constexpr):
    """A tile of bytes; the two others are for three bits."""
    there = (row < rows)[:, None]
    if BITS == 3:
        unit = columns // 8
        place = plane + row[:, None] * (2 * unit) + at[None]
        low = tl.load(place, mask=there, other=0)
        other = tl.load(place + unit, mask=there, other=0)
        top = tl.load(high + row[:, None] * unit + at[None], mask=there, other=0)
    else:
        place = plane + row[:, None] * (columns // PARTS) + at[None]
        low = tl.load(place, mask=there, other=0)
        other, top = low, low
    return low, other, top


@triton.jit(do_not_specialize=["tokens", "splits", "tiles", "tiles_each"])
def _multiply(
    x,
    plane,
    high,
    scales,
    offsets,
    output,
    sums,
    counts,
    tokens,
    rows,
    columns,
    scale_row,
    scale_group,
    splits,
    tiles,
    tiles_each,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """Some rows of a weight, in one split of its columns, times all tokens."""
    wait_and_be_followed(FOLLOWS)
    block, split = tl.program_id(0), tl.program_id(1)
    row, token = block * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    within = tl.arange(0, TILE)
    unit = columns // PARTS
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    first = split * tiles_each
    for tile in tl.range(first, tl.minimum(first + tiles_each, tiles), num_stages=STAGES):
        at = tile * TILE + within
        low, other, top = _bytes(plane, high, row, at, rows, columns, BITS, PARTS)
        if ASSEMBLY:
            scale, offset = _scale(
                scales, offsets, row, tile * TILE // GROUP, scale_row, scale_group, rows, BITS
            )
            behind = (unit + tile * TILE) // GROUP
            scale_2, offset_2 = _scale(
                scales, offsets, row, behind, scale_row, scale_group, rows, BITS
            )
            weight, weight_2 = tl.inline_asm_elementwise(
                _FOUR_BITS,
                "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
                [low, scale[:, None], offset[:, None], scale_2[:, None], offset_2[:, None]],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
            given = x + token[None] * columns + at[:, None]
            total = tl.dot(weight, tl.load(given, mask=(token < tokens)[None], other=0.0), total)
            given = given + unit
            total = tl.dot(weight_2, tl.load(given, mask=(token < tokens)[None], other=0.0), total)
        else:
            for part in tl.static_range(PARTS):
                column = part * unit + tile * TILE
                scale, offset = _scale(
                    scales, offsets, row, column // GROUP, scale_row, scale_group, rows, BITS
                )
                values = _values(low, other, top, part, BITS)
                weight = _weights(values, scale, offset, BITS).to(x.dtype.element_ty)
                given = x + token[None] * columns + column + within[:, None]
                total = tl.dot(
                    weight, tl.load(given, mask=(token < tokens)[None], other=0.0), total
                )
    wanted = (row < rows)[:, None] & (token < tokens)[None]
    target = output + token[None] * rows + row[:, None]
    if splits == 1:
        tl.store(target, total.to(output.dtype.element_ty), mask=wanted)
    else:
        place = (tl.arange(0, ROWS) * TOKENS)[:, None] + token[None]
        own = sums + block * splits * (ROWS * TOKENS)
        tl.store(own + split * (ROWS * TOKENS) + place, total)
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(counts + block, 1, sem="acq_rel") == splits - 1:
            summed = tl.zeros([ROWS, TOKENS], tl.float32)
            for each in range(splits):
                summed += tl.load(own + each * (ROWS * TOKENS) + place, cache_modifier=".cg")
            tl.store(target, summed.to(output.dtype.element_ty), mask=wanted)
            # For the next product.
            tl.store(counts + block, 0)


@triton.jit
def _unpack(
    plane,
    high,
    scales,
    offsets,
    output,
    rows,
    columns,
    scale_row,
    scale_group,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of bytes to what it stands for."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile, within = tl.program_id(1), tl.arange(0, TILE)
    unit = columns // PARTS
    low, other, top = _bytes(plane, high, row, tile * TILE + within, rows, columns, BITS, PARTS)
    for part in tl.static_range(PARTS):
        column = part * unit + tile * TILE
        scale, offset = _scale(
            scales, offsets, row, column // GROUP, scale_row, scale_group, rows, BITS
        )
        weight = _weights(_values(low, other, top, part, BITS), scale, offset, BITS)
        target = output + row.to(tl.int64)[:, None] * columns + column + within[None]
        tl.store(target, weight.to(output.dtype.element_ty), mask=(row < rows)[:, None])


def tile_of(packed: PackedGrid) -> int:
    """Bytes of a row that one tile has; fewer than `LEAST` if a weight is not for these kernels."""
    rows, columns = packed.shape
    if rows > LEAST * _MOST_BLOCKS:
        return 0
    return math.gcd(columns // packed.scales.shape[1], columns // _PARTS[packed.grid.bits], _WIDEST)


def bucket(tokens: int) -> int:
    """For how many tokens the product of so many is made."""
    return 1 if tokens == 1 else max(LEAST, 1 << (tokens - 1).bit_length())


def multiply(x: torch.Tensor, packed: PackedGrid, tiling: Tiling) -> torch.Tensor:
    """``[tokens, rows]`` in bfloat16, for ``[tokens, columns]``."""
    x = x.contiguous()
    if not tiling.fill:
        return token_kernel.multiply(x, packed, tiling.rows, tiling.warps)
    (tokens, columns), rows = x.shape, packed.shape[0]
    bits, tile, room = packed.grid.bits, tile_of(packed), max(LEAST, bucket(tokens))
    blocks, tiles = triton.cdiv(rows, tiling.rows), columns // _PARTS[bits] // tile
    each = triton.cdiv(tiles, max(1, tiling.fill * card_kernel.multiprocessors(x.device) // blocks))
    splits = triton.cdiv(tiles, each)
    stage = tile * (_PARTS[bits] * room * x.itemsize + len(packed.planes) * tiling.rows)
    stages = max(1, min(tiling.stages, _AHEAD // stage))
    output = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    sums = output
    if splits > 1:
        shape = blocks, splits, tiling.rows * room
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    _multiply[blocks, splits](
        x,
        packed.planes[0],
        packed.planes[-1],
        packed.scales,
        packed.scales if packed.offsets is None else packed.offsets,
        output,
        sums,
        _counts(x.device),
        tokens,
        rows,
        columns,
        *packed.scales.stride(),
        splits,
        tiles,
        each,
        BITS=bits,
        PARTS=_PARTS[bits],
        GROUP=group_of(packed),
        TILE=tile,
        ROWS=tiling.rows,
        TOKENS=room,
        STAGES=stages,
        ASSEMBLY=bits == 4 and assembles(x.device),
        num_warps=tiling.warps,
        **card_kernel.following(x.device),
    )
    return output


def unpack(packed: PackedGrid, dtype: torch.dtype) -> torch.Tensor:
    """What `PackedGrid.unpack` gives, to the bit."""
    rows, columns = packed.shape
    bits, tile = packed.grid.bits, tile_of(packed)
    output = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    _unpack[triton.cdiv(rows, LEAST), columns // _PARTS[bits] // tile](
        packed.planes[0],
        packed.planes[-1],
        packed.scales,
        packed.scales if packed.offsets is None else packed.offsets,
        output,
        rows,
        columns,
        *packed.scales.stride(),
        BITS=bits,
        PARTS=_PARTS[bits],
        GROUP=group_of(packed),
        TILE=tile,
        ROWS=LEAST,
        # Or product and sum would be rounded once instead of twice.
        enable_fp_fusion=False,
    )
    return output


@cache
def _counts(device: torch.device) -> torch.Tensor:
    """How many splits of each row block have ended; all are zero between products."""
    with torch.inference_mode(False):
        return torch.zeros(_MOST_BLOCKS, dtype=torch.int32, device=device)
