"""Products of one token with weights of 4 or 8 bits on a GPU: a Triton kernel.

Nothing is gained by tensor cores with one token, so each thread multiplies for itself, in float32:
it has some words of some rows, takes their integers apart with an instruction each, and all of a
program's rows are added up at the end.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from swarm_notebook.checkpoint.packed import PackedGrid

# The group of a whole row.
_ALL = 1 << 30
# 128 + byte, and 32768 + byte. The exponent comes in a register: the machine's instruction has room
# for one constant, and which bytes are meant is another one in each.
_BYTE_OF_4 = tl.constexpr(tuple(f"prmt.b32 $0, $1, $2, 0x7{index}44;" for index in range(4)))
_BYTE_OF_8 = tl.constexpr(tuple(f"prmt.b32 $0, $1, $2, 0x74{index}4;" for index in range(4)))
_EXPONENT = {4: 0x43000000, 8: 0x47000000}
_BIAS = {4: 128 + 8, 8: 32768 + 128}


@triton.jit
def _field(words, exponent, index: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """One byte of each word as a float, `_BIAS` too large."""
    if ASSEMBLY:
        # The byte among the highest bits of a fraction, below an exponent that makes it count ones.
        found = tl.inline_asm_elementwise(
            _BYTE_OF_4[index] if BITS == 4 else _BYTE_OF_8[index],
            "=f,r,r",
            [words, exponent],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        found = ((words >> (8 * index)) & 255).to(tl.float32)
    return found


@triton.jit
def _add(
    total,
    words,
    exponent,
    x,
    scales,
    offsets,
    row,
    column,
    there,
    rows,
    scale_row,
    scale_group,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """What four bytes of each of four words add to the products of some rows."""
    at = (column // GROUP)[:, None] * scale_group + row[None] * scale_row
    mask = there[:, None] & (row < rows)[None]
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    # Two bfloat16 in each integer.
    place = x + (column // 2)[:, None] + 2 * tl.arange(0, 4)[None]
    first = tl.load(place, mask=there[:, None], other=0)
    second = tl.load(place + 1, mask=there[:, None], other=0)
    x_0 = (first << 16).to(tl.float32, bitcast=True)
    x_1 = (first & -65536).to(tl.float32, bitcast=True)
    x_2 = (second << 16).to(tl.float32, bitcast=True)
    x_3 = (second & -65536).to(tl.float32, bitcast=True)
    found = _field(words, exponent, 0, BITS, ASSEMBLY) * x_0[:, None]
    found += _field(words, exponent, 1, BITS, ASSEMBLY) * x_1[:, None]
    found += _field(words, exponent, 2, BITS, ASSEMBLY) * x_2[:, None]
    found += _field(words, exponent, 3, BITS, ASSEMBLY) * x_3[:, None]
    summed = tl.sum((x_0 + x_1) + (x_2 + x_3), axis=1)
    more = -BIAS * scale
    if BITS != 8:
        more += tl.load(offsets + at, mask=mask, other=0.0).to(tl.float32)
    return total + scale * tl.sum(found, axis=2) + more * summed[:, None]


@triton.jit(do_not_specialize=["exponent"])
def _multiply_one(
    x,
    plane,
    scales,
    offsets,
    output,
    rows,
    words,
    scale_row,
    scale_group,
    exponent,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Some rows of a weight times one token; each thread has four words of all of these rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk, word = tl.arange(0, CHUNKS), tl.arange(0, 4)
    # Chunks first: then Triton lays them along the threads, and rows into each.
    total = tl.zeros([CHUNKS, ROWS], tl.float32)
    for first in range(0, words // 4, CHUNKS):
        at = first + chunk
        there = at < words // 4
        found = tl.load(
            plane + (4 * at)[:, None, None] + row[None, :, None] * words + word[None, None],
            mask=there[:, None, None] & (row < rows)[None, :, None],
            other=0,
        )
        if BITS == 4:
            low, high = found & 0x0F0F0F0F, (found >> 4) & 0x0F0F0F0F
            total = _add(
                total, low, exponent, x, scales, offsets, row, 16 * at, there, rows, scale_row,
                scale_group, BITS, GROUP, BIAS, ASSEMBLY,
            )  # fmt: skip
            total = _add(
                total, high, exponent, x, scales, offsets, row, 4 * words + 16 * at, there, rows,
                scale_row, scale_group, BITS, GROUP, BIAS, ASSEMBLY,
            )  # fmt: skip
        else:
            # Around zero to around 128: all bits but the highest stay.
            total = _add(
                total, found ^ -2139062144, exponent, x, scales, offsets, row, 16 * at, there, rows,
                scale_row, scale_group, BITS, GROUP, BIAS, ASSEMBLY,
            )  # fmt: skip
    result = tl.sum(total, axis=0).to(output.dtype.element_ty)
    tl.store(output + row, result, mask=row < rows)


def multiply(x: torch.Tensor, packed: PackedGrid, rows_each: int, warps: int) -> torch.Tensor:
    """``[1, rows]`` in bfloat16, for ``[1, columns]``.

    Args:
        packed: of 4 or 8 bits.
        rows_each: of one program.
    """
    rows, bits, assembly = packed.shape[0], packed.grid.bits, assembles(x.device)
    plane = packed.planes[0].view(torch.int32)
    output = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    _multiply_one[(triton.cdiv(rows, rows_each),)](
        x.view(torch.int32),
        plane,
        packed.scales,
        packed.scales if packed.offsets is None else packed.offsets,
        output,
        rows,
        plane.shape[1],
        *packed.scales.stride(),
        _EXPONENT[bits],
        BITS=bits,
        GROUP=group_of(packed),
        ROWS=rows_each,
        CHUNKS=32 * warps,
        BIAS=_BIAS[bits] if assembly else 1 << (bits - 1),
        ASSEMBLY=assembly,
        num_warps=warps,
    )
    return output


def group_of(packed: PackedGrid) -> int:
    """How many columns have one scale."""
    groups = packed.scales.shape[1]
    return _ALL if groups == 1 else packed.shape[1] // groups


@cache
def assembles(device: torch.device) -> bool:
    """Whether it is a card for which the instructions here are written: NVIDIA's since Ampere."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
