"""A matrix of GPTQ's or AWQ's integers in memory: ``(integer - zero) * scale``, exactly.

They are unpacked for each product, but for those of four bits on a CPU (`products.int4`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from swarm_notebook.checkpoint.packed import FourBits, Packed, gathered, spread


@dataclass(frozen=True)
class PackedWords(Packed):
    """One matrix.

    Attributes:
        bits: of an integer in ``plane``: 2, 4 or 8.
        plane: ``[rows, columns * bits / 8]`` bytes.
        zeros: ``[rows, groups]`` bytes.
        scales: ``[rows, groups]``, in the precision of the file.
        index: ``[columns]``, the group of each column; None where a group is of neighbours.
    """

    shape: torch.Size
    bits: int
    plane: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    index: torch.Tensor | None

    def parts(self) -> Sequence[torch.Tensor]:
        parts = [self.plane, self.zeros, self.scales]
        return parts if self.index is None else [*parts, self.index]

    def around(self, parts: Sequence[torch.Tensor]) -> PackedWords:
        plane, zeros, scales, *index = parts
        return replace(
            self, plane=plane, zeros=zeros, scales=scales, index=index[0] if index else None
        )

    def on(self, device: torch.device) -> PackedWords:
        return self.around([part.to(device) for part in self.parts()])

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        values = spread(self.plane, self.bits).to(torch.float32)
        zeros, scales = self.zeros.to(torch.float32), self.scales.to(torch.float32)
        if self.index is None:
            groups = values.view(len(values), zeros.shape[1], -1)
            groups.sub_(zeros[:, :, None]).mul_(scales[:, :, None])
        else:
            values.sub_(zeros[:, self.index]).mul_(scales[:, self.index])
        return values.to(dtype)

    def four_bits(self) -> FourBits | None:
        if self.bits != 4 or self.index is not None:
            return None
        group = self.shape[1] // self.zeros.shape[1]
        return FourBits(group, spread(self.plane, 4), (self.zeros, self.scales), _scales)


def _scales(zeros: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = scales.to(torch.float32)
    return scales, -zeros.to(torch.float32) * scales


def packed_words(
    bits: int,
    integers: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    index: torch.Tensor,
) -> PackedWords:
    """Put integers into as few bytes as hold them.

    Args:
        bits: of an integer.
        integers: ``[rows, columns]``.
        zeros: ``[rows, groups]``, scales likewise.
        index: ``[columns]``.
    """
    columns, groups = integers.shape[1], zeros.shape[1]
    # Columns that do not fill their last byte get one each.
    bits = bits if columns % (8 // bits) == 0 else 8
    size = columns // groups
    neighbours = size * groups == columns and torch.equal(index, torch.arange(columns) // size)
    return PackedWords(
        integers.shape,
        bits,
        gathered(integers.to(torch.uint8), bits),
        zeros.to(torch.uint8).contiguous(),
        scales.contiguous(),
        None if neighbours else index.to(torch.int32),
    )
