"""Weights of four bits and fewer in the order in which torch's operator for CPUs reads four.

The operator takes a scale and an offset in bfloat16 for each group of a row, and tokens in bfloat16
too. Those of `--bits` are such (`OfGrid`). Those of a GGUF, GPTQ or AWQ file are finer: each is the
sum of two then, and the operator runs with either (`OfFile`).

Its name is private and its layout not documented, so it is tried out before it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Any, Self

import torch

from swarm_notebook.checkpoint.packed import Grid, Packed, PackedGrid, pack

# Rows of a weight that one block of the layout holds (AVX-512); weights of a scale that the
# operator knows.
_TILE, _GROUPS = 64, (32, 64, 128, 256)
# How far an operator's result may be from that of unpacking, relative to it: bfloat16 has 8 bits.
_CLOSE = 2e-2


@dataclass(frozen=True)
class OfGrid(Packed):
    """Of a `PackedGrid`.

    Three and two bits are widened for each product, a byte of two weights at a time, which costs a
    tenth of unpacking.

    Attributes:
        bits: of a weight: 4, 3 or 2.
        planes: bytes. Of 4 bits two weights in each, of 3 and 2 bits the lower two of four weights,
            of 3 bits the highest one of eight.
        scales: ``[groups, rows, 2]``: scales and offsets.
    """

    shape: torch.Size
    bits: int
    group: int
    planes: tuple[torch.Tensor, ...]
    scales: torch.Tensor

    def parts(self) -> Sequence[torch.Tensor]:
        return [*self.planes, self.scales]

    def around(self, parts: Sequence[torch.Tensor]) -> Self:
        *planes, scales = parts
        return with_fields(self, planes=tuple(planes), scales=scales)

    def plane(self) -> torch.Tensor:
        """Four bits of each weight, around 8: ``[rows, columns / 2]`` bytes."""
        if self.bits == 4:
            return self.planes[0]
        two = self.planes[0]
        wide = torch.cat([two & 0x33, (two >> 2) & 0x33])
        if self.bits == 3:
            (one,) = self.planes[1:]
            wide |= torch.cat([(one << 2) & 0x44, (one << 1) & 0x44, one & 0x44, (one >> 1) & 0x44])
        wide += 0x11 * _below(self.bits)
        return wide.view(self.shape[0], -1)

    def terms(self) -> list[torch.Tensor]:
        """Scales and offsets as the operator takes them, to be added up."""
        return [self.scales]

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        scales, offsets = self.scales.to(torch.float32).permute(2, 1, 0)
        integers = _integers(self.plane(), self.shape, self.group).sub_(8)
        return _unpacked(integers, scales, offsets).view(self.shape).to(dtype)


@dataclass(frozen=True)
class OfFile(Packed):
    """Of a matrix as its file has it.

    Attributes:
        nibbles: ``[rows, columns / 2]`` bytes.
        rest, scales: as in `FourBits`.
    """

    shape: torch.Size
    group: int
    nibbles: torch.Tensor
    rest: tuple[torch.Tensor, ...]
    scales: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def parts(self) -> Sequence[torch.Tensor]:
        return [self.nibbles, *self.rest]

    def around(self, parts: Sequence[torch.Tensor]) -> Self:
        nibbles, *rest = parts
        return with_fields(self, nibbles=nibbles, rest=tuple(rest))

    def plane(self) -> torch.Tensor:
        """Four bits of each weight, around 8: ``[rows, columns / 2]`` bytes."""
        return self.nibbles

    def terms(self) -> list[torch.Tensor]:
        """Scales and offsets as the operator takes them, to be added up."""
        scales, offsets = self.scales(*self.rest)
        both = torch.stack([scales, offsets + 8 * scales], dim=2).transpose(0, 1)
        high = both.to(torch.bfloat16).contiguous()
        return [high, (both - high).to(torch.bfloat16).contiguous()]

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        integers = _integers(self.nibbles, self.shape, self.group)
        return _unpacked(integers, *self.scales(*self.rest)).view(self.shape).to(dtype)


def arranged(packed: Packed) -> Packed | None:
    """A matrix in this order, in as many bytes; None if the operator is not for it."""
    if packed.shape[0] % _TILE:
        return None
    if isinstance(packed, PackedGrid):
        group = packed.shape[1] // packed.scales.shape[1]
        wanted = packed.grid.bits <= 4 and group in _GROUPS
        return _of_grid(packed) if wanted and _works(packed.grid.bits) else None
    four = packed.four_bits()
    if four is None or four.group not in _GROUPS or not _works(4):
        return None
    return OfFile(packed.shape, four.group, _laid_out(four.integers), four.rest, four.scales)


def multiply(x: torch.Tensor, packed: OfGrid | OfFile) -> torch.Tensor:
    """Tokens by a matrix.

    Args:
        x: ``[tokens, columns]`` in bfloat16.
    """
    plane = packed.plane()
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu
    first, *more = (operator(x, plane, packed.group, term) for term in packed.terms())
    return sum(more, first)


def agrees(
    operator: Callable[[torch.Tensor, Any], torch.Tensor],
    made: Callable[[], Packed],
    weight: torch.Tensor,
) -> bool:
    """Whether an operator is there, and gives for what is ``made`` what the weight gives."""
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
    x = x.to(torch.bfloat16)
    try:
        packed = made()
        found = operator(x, packed)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    expected = x.float() @ weight.t()
    close = (found.float() - expected).abs().max() <= _CLOSE * expected.abs().max()
    return bool(close) and torch.equal(packed.unpack(torch.float32), weight)


@functools.cache
def _works(bits: int) -> bool:
    noise = torch.Generator().manual_seed(0)
    packed = pack(torch.randn(2 * _TILE, 128, generator=noise), Grid(bits, 64))
    return agrees(multiply, lambda: _of_grid(packed), packed.unpack(torch.float32))


def _of_grid(packed: PackedGrid) -> OfGrid:
    bits, group = packed.grid.bits, packed.shape[1] // packed.scales.shape[1]
    plane = _laid_out(packed.integers() + 8)
    planes = [plane]
    if bits < 4:
        flat = plane.flatten() - 0x11 * _below(bits)
        first, second = (flat & 0x33).chunk(2)
        planes = [first | (second << 2)]
        if bits == 3:
            highest = [(part >> 2) << place for place, part in enumerate((flat & 0x44).chunk(4))]
            planes.append(highest[0] | highest[1] | highest[2] | highest[3])
    offsets = torch.zeros_like(packed.scales) if packed.offsets is None else packed.offsets
    scales = torch.stack([packed.scales, offsets], dim=2).transpose(0, 1).contiguous()
    return OfGrid(packed.shape, bits, group, tuple(planes), scales)


def _below(bits: int) -> int:
    """The least integer of so many bits, where 8 is the middle."""
    return 8 - (1 << (bits - 1))


def _laid_out(integers: torch.Tensor) -> torch.Tensor:
    """Integers of four bits, ``[rows, columns]``, in the operator's order."""
    plane: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        integers.to(torch.int32), 1
    )
    return plane


def _integers(plane: torch.Tensor, shape: torch.Size, group: int) -> torch.Tensor:
    """The same back, in float32: ``[rows, groups, weights of a group]``."""
    rows, columns = shape
    tiles = plane.view(rows // _TILE, columns, _TILE // 2)
    integers = torch.cat([tiles & 15, tiles >> 4], dim=2).transpose(1, 2)
    return integers.reshape(rows, -1, group).to(torch.float32)


def _unpacked(integers: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """In the place of the integers; a scale and an offset for each group: ``[rows, groups]``."""
    return integers.mul_(scales[:, :, None]).add_(offsets[:, :, None])
