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
from swarm_notebook.server.engine import card_kernel
from swarm_notebook.server.engine.card_kernel import wait_and_be_followed

# The group of a whole row.
_ALL = 1 << 30
# 128 + byte for bytes below 128, and 32768 + byte. The exponent comes in a register: the machine's
# instruction has room for one constant, and which bytes are meant is another one in each.
_BYTE_OF_4 = tl.constexpr(tuple(f"prmt.b32 $0, $1, $2, 0x7{index}44;" for index in range(4)))
_BYTE_OF_8 = tl.constexpr(tuple(f"prmt.b32 $0, $1, $2, 0x74{index}4;" for index in range(4)))
_EXPONENT, _EXPONENT_HIGH = 0x43000000, 0x47000000
# Half of what the bytes range over counts as zero.
_BIAS, _BIAS_HIGH = 8, 128


@triton.jit
def _field(words, exponent, index: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr):
    """One byte of each word as a float, too large by 128, or by 32768 for `HIGH`."""
    if ASSEMBLY:
        # The byte among the highest bits of a fraction, below an exponent that makes it count ones.
        found = tl.inline_asm_elementwise(
            _BYTE_OF_8[index] if HIGH else _BYTE_OF_4[index],
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
def _scales(
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
    TIMES: tl.constexpr,
):
    """What some rows are multiplied by from some columns on, and what then is added."""
    at = (column // GROUP)[:, None] * scale_group + row[None] * scale_row
    mask = there[:, None] & (row < rows)[None]
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32) / TIMES
    more = -BIAS * scale
    if BITS != 8:
        more += tl.load(offsets + at, mask=mask, other=0.0).to(tl.float32)
    return scale, more


@triton.jit
def _word(total, words, exponent, x, place, there, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr):
    """What the four bytes of a word add to the products of some rows, and the four of the token."""
    # Two bfloat16 in each integer.
    first = tl.load(x + place, mask=there, other=0)
    second = tl.load(x + place + 1, mask=there, other=0)
    x_0 = (first << 16).to(tl.float32, bitcast=True)
    x_1 = (first & -65536).to(tl.float32, bitcast=True)
    x_2 = (second << 16).to(tl.float32, bitcast=True)
    x_3 = (second & -65536).to(tl.float32, bitcast=True)
    total += _field(words, exponent, 0, HIGH, ASSEMBLY) * x_0[:, None]
    total += _field(words, exponent, 1, HIGH, ASSEMBLY) * x_1[:, None]
    total += _field(words, exponent, 2, HIGH, ASSEMBLY) * x_2[:, None]
    total += _field(words, exponent, 3, HIGH, ASSEMBLY) * x_3[:, None]
    return total, (x_0 + x_1) + (x_2 + x_3)


@triton.jit
def _add(
    total,
    words,
    exponent,
    x,
    scale,
    more,
    column,
    there,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    HIGH: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """What four bytes of each of four words add to the products of some rows."""
    even, odd = tl.split(tl.reshape(words, [CHUNKS, ROWS, 2, 2]))
    word_0, word_2 = tl.split(even)
    word_1, word_3 = tl.split(odd)
    place = column // 2
    found = tl.zeros([CHUNKS, ROWS], tl.float32)
    found, x_0 = _word(found, word_0, exponent, x, place, there, HIGH, ASSEMBLY)
    found, x_1 = _word(found, word_1, exponent, x, place + 2, there, HIGH, ASSEMBLY)
    found, x_2 = _word(found, word_2, exponent, x, place + 4, there, HIGH, ASSEMBLY)
    found, x_3 = _word(found, word_3, exponent, x, place + 6, there, HIGH, ASSEMBLY)
    summed = (x_0 + x_1) + (x_2 + x_3)
    return total + scale * found + more * summed[:, None]


@triton.jit
def _read(
    plane,
    scales,
    offsets,
    row,
    chunk,
    rows,
    words,
    scale_row,
    scale_group,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_HIGH: tl.constexpr,
):
    """Some words of some rows, and the scales of their columns; at 4 bits of both halves."""
    there = chunk < words // 4
    found = tl.load(
        plane
        + (4 * chunk)[:, None, None]
        + row[None, :, None] * words
        + tl.arange(0, 4)[None, None],
        mask=there[:, None, None] & (row < rows)[None, :, None],
        other=0,
    )
    if BITS == 4:
        scale, more = _scales(
            scales, offsets, row, 16 * chunk, there, rows, scale_row, scale_group, BITS, GROUP,
            BIAS, 1,
        )  # fmt: skip
        scale_2, more_2 = _scales(
            scales, offsets, row, 4 * words + 16 * chunk, there, rows, scale_row, scale_group, BITS,
            GROUP, BIAS_HIGH, 16,
        )  # fmt: skip
    else:
        scale, more = _scales(
            scales, offsets, row, 16 * chunk, there, rows, scale_row, scale_group, BITS, GROUP,
            BIAS_HIGH, 1,
        )  # fmt: skip
        scale_2, more_2 = scale, more
    return found, scale, more, scale_2, more_2


@triton.jit
def _add_all(
    total,
    found,
    scale,
    more,
    scale_2,
    more_2,
    x,
    chunk,
    words,
    exponent,
    exponent_high,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """What words that have been read add to the products of some rows."""
    there, column = chunk < words // 4, 16 * chunk
    if BITS == 4:
        total = _add(
            total, found & 0x0F0F0F0F, exponent, x, scale, more, column, there, CHUNKS, ROWS,
            False, ASSEMBLY,
        )  # fmt: skip
        column += 4 * words
        # Sixteen times as much as they stand for, which `_read` has taken off their scale.
        total = _add(
            total, found & -252645136, exponent_high, x, scale_2, more_2, column, there, CHUNKS,
            ROWS, True, ASSEMBLY,
        )  # fmt: skip
    else:
        # Around zero to around 128: all bits but the highest stay.
        total = _add(
            total, found ^ -2139062144, exponent_high, x, scale, more, column, there, CHUNKS, ROWS,
            True, ASSEMBLY,
        )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["exponent", "exponent_high"])
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
    exponent_high,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ONCE: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_HIGH: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """Some rows of a weight times one token; each thread has four words of all of these rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.arange(0, CHUNKS)
    # Chunks first: then Triton lays them along the threads, and rows into each.
    total = tl.zeros([CHUNKS, ROWS], tl.float32)
    found, scale, more, scale_2, more_2 = _read(
        plane, scales, offsets, row, chunk, rows, words, scale_row, scale_group, BITS, GROUP, BIAS,
        BIAS_HIGH,
    )  # fmt: skip
    wait_and_be_followed(FOLLOWS)
    if not ONCE:
        # What comes next is read while this is multiplied.
        for _ in range(CHUNKS, words // 4, CHUNKS):
            following = _read(
                plane, scales, offsets, row, chunk + CHUNKS, rows, words, scale_row, scale_group,
                BITS, GROUP, BIAS, BIAS_HIGH,
            )  # fmt: skip
            total = _add_all(
                total, found, scale, more, scale_2, more_2, x, chunk, words, exponent,
                exponent_high, BITS, CHUNKS, ROWS, ASSEMBLY,
            )  # fmt: skip
            found, scale, more, scale_2, more_2 = following
            chunk += CHUNKS
    total = _add_all(
        total, found, scale, more, scale_2, more_2, x, chunk, words, exponent, exponent_high, BITS,
        CHUNKS, ROWS, ASSEMBLY,
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
        _EXPONENT,
        _EXPONENT_HIGH,
        BITS=bits,
        GROUP=group_of(packed),
        ROWS=rows_each,
        CHUNKS=32 * warps,
        ONCE=plane.shape[1] // 4 <= 32 * warps,
        BIAS=_BIAS + 128 * assembly,
        BIAS_HIGH=_BIAS_HIGH + 32768 * assembly,
        ASSEMBLY=assembly,
        num_warps=warps,
        **card_kernel.following(x.device),
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
