"""Matrices of a GGUF file as they are stored there, unpacked for each operation.

Torch unpacks them where they lie, on a CPU or on a card, and gives what the `gguf` package gives,
bit by bit. The package itself does it in numpy, for which a card's weights travel at each product;
it is asked for types that hardly any file has. A row is a sequence of groups, each of as many
bytes; the layouts are those of ggml (`block_q4_K` and its kind).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from swarm_notebook.checkpoint.packed import FourBits, Packed

# The sixteen values that four bits stand for in the types whose names begin with IQ4 (ggml).
_UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Those of MXFP4 (OCP Microscaling Formats 1.0, table of E2M1), twice.
_DOUBLED_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# Weights that share one of the scales of a group of 256, or of 32.
_PART = 32


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
        known = _READERS.get(self.kind.name)
        if known is None:
            from gguf.quants import dequantize

            values = torch.from_numpy(dequantize(self.raw.cpu().numpy(), self.kind)).to(self.device)
        else:
            reader, size = known
            values = reader(self.raw.view(self.raw.shape[0], -1, size))
        return values.reshape(self.shape).to(dtype)

    def four_bits(self) -> FourBits | None:
        if self.kind.name not in _FOUR_BITS:
            return None
        head, length, scales = _FOUR_BITS[self.kind.name]
        groups = self.raw.view(self.raw.shape[0], -1, _READERS[self.kind.name][1])
        integers = _by_parts(groups[..., head:], length, 4).flatten(1)
        return FourBits(_PART, integers, (groups[..., :head].contiguous(),), scales)


def _halves(groups: torch.Tensor) -> torch.Tensor:
    """Two bytes of each group as a float16, in float32."""
    return groups.contiguous().view(torch.float16).to(torch.float32)


def _fields(plane: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of so few bits, ``[..., n]`` to ``[..., 8 / bits * n]``: first the lowest of all."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=plane.device)
    fields = (plane.unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)
    return fields.flatten(-2)


def _in_turn(plane: torch.Tensor, bits: int) -> torch.Tensor:
    """The same, first all of the first byte."""
    return _fields(plane.unsqueeze(-1), bits).flatten(-2)


def _by_parts(plane: torch.Tensor, length: int, bits: int) -> torch.Tensor:
    """The same, first all of the first ``length`` bytes."""
    return _fields(plane.unflatten(-1, (-1, length)), bits).flatten(-2)


def _scaled(integers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Each scale multiplies as many neighbours: ``[..., scales, weights of a scale]``."""
    return integers.unflatten(-1, (scales.shape[-1], -1)).to(torch.float32) * scales.unsqueeze(-1)


def _q4_0(groups: torch.Tensor) -> torch.Tensor:
    return (_fields(groups[..., 2:], 4).to(torch.float32) - 8) * _halves(groups[..., :2])


def _q4_1(groups: torch.Tensor) -> torch.Tensor:
    scales, offsets = _halves(groups[..., :2]), _halves(groups[..., 2:4])
    return _fields(groups[..., 4:], 4).to(torch.float32) * scales + offsets


def _q5(groups: torch.Tensor) -> torch.Tensor:
    integers = _fields(groups[..., 4:], 4) | (_in_turn(groups[..., :4], 1) << 4)
    return integers.to(torch.float32)


def _q5_0(groups: torch.Tensor) -> torch.Tensor:
    return (_q5(groups[..., 2:]) - 16) * _halves(groups[..., :2])


def _q5_1(groups: torch.Tensor) -> torch.Tensor:
    return _q5(groups[..., 4:]) * _halves(groups[..., :2]) + _halves(groups[..., 2:4])


def _q8_0(groups: torch.Tensor) -> torch.Tensor:
    return groups[..., 2:].view(torch.int8).to(torch.float32) * _halves(groups[..., :2])


def _q2_k(groups: torch.Tensor) -> torch.Tensor:
    scales, plane = groups[..., :16], groups[..., 16:80]
    factors = _halves(groups[..., 80:82]) * (scales & 15).to(torch.float32)
    offsets = _halves(groups[..., 82:84]) * (scales >> 4).to(torch.float32)
    return _scaled(_by_parts(plane, _PART, 2), factors) - offsets.unsqueeze(-1)


def _q3_k(groups: torch.Tensor) -> torch.Tensor:
    high, plane, scales = groups[..., :32], groups[..., 32:96], groups[..., 96:108]
    six_bits = _fields(scales[..., :8], 4) | (_fields(scales[..., 8:], 2) << 4)
    factors = _halves(groups[..., 108:110]) * (six_bits.to(torch.float32) - 32)
    integers = _by_parts(plane, _PART, 2) | (_fields(high, 1) << 2)
    return _scaled(integers.to(torch.float32) - 4, factors)


def _factors_and_offsets(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Q4_K and Q5_K: eight each, of six bits, those of the last four in pieces."""
    first, second, third = groups[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=-1)
    offsets = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=-1)
    return (
        _halves(groups[..., :2]) * scales.to(torch.float32),
        _halves(groups[..., 2:4]) * offsets.to(torch.float32),
    )


def _scales_of_q4_0(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = _halves(heads).flatten(1)
    return scales, -8 * scales


def _scales_of_q4_1(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _halves(heads[..., :2]).flatten(1), _halves(heads[..., 2:]).flatten(1)


def _scales_of_q4_k(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    factors, offsets = _factors_and_offsets(heads)
    return factors.flatten(1), -offsets.flatten(1)


def _q4_k(groups: torch.Tensor) -> torch.Tensor:
    factors, offsets = _factors_and_offsets(groups)
    return _scaled(_by_parts(groups[..., 16:], _PART, 4), factors) - offsets.unsqueeze(-1)


def _q5_k(groups: torch.Tensor) -> torch.Tensor:
    factors, offsets = _factors_and_offsets(groups)
    integers = _by_parts(groups[..., 48:], _PART, 4) | (_fields(groups[..., 16:48], 1) << 4)
    return _scaled(integers, factors) - offsets.unsqueeze(-1)


def _q6_k(groups: torch.Tensor) -> torch.Tensor:
    low, high = _by_parts(groups[..., :128], 64, 4), _by_parts(groups[..., 128:192], _PART, 2)
    scales = groups[..., 192:208].view(torch.int8).to(torch.float32)
    integers = (low | (high << 4)).to(torch.float32) - 32
    return _scaled(integers, _halves(groups[..., 208:210]) * scales)


def _looked_up(fields: torch.Tensor, values: Sequence[int]) -> torch.Tensor:
    # One by one: a list would be copied to a card, which a CUDA graph cannot take in.
    table = [torch.full((1,), float(value), device=fields.device) for value in values]
    return torch.cat(table)[fields.to(torch.int32)]


def _iq4_nl(groups: torch.Tensor) -> torch.Tensor:
    return _looked_up(_fields(groups[..., 2:], 4), _UNEVEN) * _halves(groups[..., :2])


def _iq4_xs(groups: torch.Tensor) -> torch.Tensor:
    six_bits = _in_turn(groups[..., 4:8], 4) | (_in_turn(groups[..., 2:4], 2) << 4)
    factors = _halves(groups[..., :2]) * (six_bits.to(torch.float32) - 32)
    return _scaled(_looked_up(_by_parts(groups[..., 8:], 16, 4), _UNEVEN), factors)


def _mxfp4(groups: torch.Tensor) -> torch.Tensor:
    # An exponent alone, and half of it, as the values are doubled.
    exponents = groups[..., :1].to(torch.int32)
    small, others = (1 << 21) << exponents.clamp(max=1), (exponents - 1) << 23
    scales = torch.where(exponents < 2, small, others).view(torch.float32)
    return _looked_up(_fields(groups[..., 1:], 4), _DOUBLED_E2M1) * scales


# How a type's groups are read, and the bytes of one.
_READERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "Q4_0": (_q4_0, 18),
    "Q4_1": (_q4_1, 20),
    "Q5_0": (_q5_0, 22),
    "Q5_1": (_q5_1, 24),
    "Q8_0": (_q8_0, 34),
    "Q2_K": (_q2_k, 84),
    "Q3_K": (_q3_k, 110),
    "Q4_K": (_q4_k, 144),
    "Q5_K": (_q5_k, 176),
    "Q6_K": (_q6_k, 210),
    "IQ4_NL": (_iq4_nl, 18),
    "IQ4_XS": (_iq4_xs, 136),
    "MXFP4": (_mxfp4, 17),
    "F16": (_halves, 2),
    "BF16": (lambda groups: groups.contiguous().view(torch.bfloat16).to(torch.float32), 2),
}

# Of those with four bits and floats: the bytes before the integers, how many bytes of these are in
# order, and what makes scales and offsets of the former.
_FOUR_BITS: dict[str, tuple[int, int, Callable[..., tuple[torch.Tensor, torch.Tensor]]]] = {
    "Q4_0": (2, 16, _scales_of_q4_0),
    "Q4_1": (4, 16, _scales_of_q4_1),
    "Q4_K": (16, 32, _scales_of_q4_k),
}
