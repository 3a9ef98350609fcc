"""Matrices of a GGUF file as they are stored there, unpacked for each operation.

Q4_0, Q4_1 and Q8_0, which small files have, are unpacked by torch; all others by the `gguf`
package. Both give what the package gives, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from swarm_notebook.checkpoint.packed import Packed

# Weights that share a scale, in the types that are unpacked here.
_GROUP = 32


@dataclass(frozen=True)
class PackedGguf(Packed):
    """A matrix in one of GGUF's types.

    Attributes:
        kind: `gguf.GGMLQuantizationType`.
        raw: ``[rows, bytes of a row]``.
    """

    kind: Any
    shape: torch.Size
    raw: torch.Tensor

    def parts(self) -> Sequence[torch.Tensor]:
        return [self.raw]

    def around(self, parts: Sequence[torch.Tensor]) -> PackedGguf:
        return replace(self, raw=parts[0])

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        reader = _READERS.get(self.kind.name)
        if reader is None:
            from gguf.quants import dequantize

            values = torch.from_numpy(dequantize(self.raw.cpu().numpy(), self.kind)).to(self.device)
        else:
            values = reader(self.raw)
        return values.reshape(self.shape).to(dtype)


def _halves(blocks: torch.Tensor) -> torch.Tensor:
    """Two bytes of each group as a float16, in float32."""
    return blocks.contiguous().view(torch.float16).to(torch.float32)


def _nibbles(blocks: torch.Tensor) -> torch.Tensor:
    return torch.cat([blocks & 15, blocks >> 4], dim=-1)


def _q4_0(raw: torch.Tensor) -> torch.Tensor:
    groups = raw.view(raw.shape[0], -1, 2 + _GROUP // 2)
    return (_nibbles(groups[..., 2:]).to(torch.float32) - 8) * _halves(groups[..., :2])


def _q4_1(raw: torch.Tensor) -> torch.Tensor:
    groups = raw.view(raw.shape[0], -1, 4 + _GROUP // 2)
    scales, offsets = _halves(groups[..., :2]), _halves(groups[..., 2:4])
    return _nibbles(groups[..., 4:]).to(torch.float32) * scales + offsets


def _q8_0(raw: torch.Tensor) -> torch.Tensor:
    groups = raw.view(raw.shape[0], -1, 2 + _GROUP)
    return groups[..., 2:].view(torch.int8).to(torch.float32) * _halves(groups[..., :2])


_READERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}
