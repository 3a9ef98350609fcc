"""Weights in few bits per number, in the place of a module's parameter.

A `PackedWeight` has the shape and the dtype of the weight that it stands for and the memory of its
bits. Whatever torch does to it happens to the unpacked values, which live for that operation alone;
so every module, PEFT and autograd find what they expect. What multiplies by it often should know
it: see `server.engine.products.few_bits`.

The bits are a `Packed`: integers in groups of neighbours, each with a scale and an offset
(``value = (integer - 2**(bits - 1)) * scale + offset``).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree

# Scales and offsets have these bits: bfloat16, as torch's own products with four bits want them.
SCALE_BITS = 16


@dataclass(frozen=True)
class FourBits:
    """A matrix of four bits taken apart: ``integer * scale + offset``, in float32, is what it is.

    Attributes:
        group: so many neighbours of a row share a scale and an offset.
        integers: ``[rows, columns]``, 0 to 15.
        rest: what scales and offsets are made of.
        scales: makes them of it, ``[rows, groups]`` each, in float32.
    """

    group: int
    integers: torch.Tensor
    rest: tuple[torch.Tensor, ...]
    scales: Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Packed(ABC):
    """A matrix in few bits.

    Attributes:
        shape: of the weight that it stands for.
    """

    shape: torch.Size

    @abstractmethod
    def parts(self) -> Sequence[torch.Tensor]:
        """The tensors that hold the bits."""

    @abstractmethod
    def around(self, parts: Sequence[torch.Tensor]) -> Self:
        """The same with other tensors, in the order of `parts`."""

    @abstractmethod
    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight itself."""

    def four_bits(self) -> FourBits | None:
        """The matrix taken apart, if it is of four bits with floats for a group of neighbours."""
        return None

    @property
    def device(self) -> torch.device:
        return self.parts()[0].device

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.itemsize for part in self.parts())


@dataclass(frozen=True)
class Grid:
    """How a weight is rounded.

    Attributes:
        bits: of an integer: 2, 3, 4 or 8.
        group: so many neighbours along the last dimension share a scale; 0 is a whole row.
    """

    bits: int
    group: int

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can be packed so."""
        return shape[-1] % max(8, self.group) == 0

    def cost(self, shape: Sequence[int]) -> float:
        """Bits per weight, with scales and offsets."""
        numbers = 1 if self.bits == 8 else 2
        return self.bits + numbers * SCALE_BITS / (self.group or shape[-1])


@dataclass(frozen=True)
class PackedGrid(Packed):
    """Integers of a `Grid`, and their scales and offsets.

    Attributes:
        planes: bytes that hold the integers, each ``[rows, …]``: those of 3 bits in two planes.
        scales: ``[rows, groups]``; offsets likewise, None where they are zero.
    """

    grid: Grid
    shape: torch.Size
    planes: tuple[torch.Tensor, ...]
    scales: torch.Tensor
    offsets: torch.Tensor | None

    def parts(self) -> Sequence[torch.Tensor]:
        return [*self.planes, self.scales, *([] if self.offsets is None else [self.offsets])]

    def around(self, parts: Sequence[torch.Tensor]) -> Self:
        planes, rest = parts[: len(self.planes)], parts[len(self.planes) :]
        offsets = None if self.offsets is None else rest[1]
        return with_fields(self, planes=tuple(planes), scales=rest[0], offsets=offsets)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        values = self.integers().to(torch.float32)
        groups = values.view(values.shape[0], self.scales.shape[1], -1)
        groups.mul_(self.scales.to(torch.float32)[:, :, None])
        if self.offsets is not None:
            groups.add_(self.offsets.to(torch.float32)[:, :, None])
        return values.view(self.shape).to(dtype)

    def integers(self) -> torch.Tensor:
        """Around zero, ``[rows, columns]``."""
        if self.grid.bits == 8:
            return self.planes[0]
        values: torch.Tensor | int = 0
        for plane, (bits, shift) in zip(self.planes, _PLANES[self.grid.bits], strict=True):
            values = values | (spread(plane, bits) << shift)
        return torch.as_tensor(values).to(torch.int8) - (1 << (self.grid.bits - 1))


# The planes of an integer, as (bits, how far they are shifted).
_PLANES = {2: ((2, 0),), 3: ((2, 0), (1, 2)), 4: ((4, 0),)}


def spread(plane: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes to integers: the lowest bits of all bytes first, then the next ones."""
    mask = (1 << bits) - 1
    return torch.cat([(plane >> shift) & mask for shift in range(0, 8, bits)], dim=1)


def gathered(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers to bytes, as `spread` reads them."""
    mask = (1 << bits) - 1
    parts = values.chunk(8 // bits, dim=1)
    plane = parts[0] & mask
    for index, part in enumerate(parts[1:], 1):
        plane = plane | ((part & mask) << (index * bits))
    return plane.contiguous()


# Parts of a group's range that are tried: large values are rounded worse, and all others better.
_SHRUNK = {2: (1.0, 0.9, 0.8, 0.7), 3: (1.0, 0.9, 0.8), 4: (1.0, 0.92, 0.84)}
# So many weights are rounded at once: what that takes in memory is some times as much.
_CHUNK = 1 << 22


def pack(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> PackedGrid:
    """Round a weight to a grid.

    Args:
        importance: how much an error in each column matters, ``[columns]``: the mean square of what
            it is multiplied by. Ranges are chosen by it.
    """
    flat = weight.reshape(-1, weight.shape[-1])
    rows = max(1, _CHUNK // flat.shape[1])
    packed = [_pack_rows(part, grid, importance) for part in flat.split(rows)]
    planes, scales, offsets = zip(*packed, strict=True)
    return PackedGrid(
        grid,
        weight.shape,
        tuple(torch.cat(parts) for parts in zip(*planes, strict=True)),
        torch.cat(scales),
        None if grid.bits == 8 else torch.cat(offsets),
    )


def _pack_rows(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    values = weight.float()
    half = 1 << (grid.bits - 1)
    if grid.bits == 8:
        scales = _rounded(values.abs().amax(dim=1, keepdim=True) / (half - 1))
        integers = (values / scales.float()).round_().clamp_(-half, half - 1).to(torch.int8)
        return (integers,), scales, scales
    groups = values.view(values.shape[0], -1, grid.group or values.shape[1])
    weights = None if importance is None else importance.float().view(1, *groups.shape[1:])
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    middle, reach = (low + high) / 2, (high - low) / 2
    best: tuple[torch.Tensor, ...] = ()
    for part in _SHRUNK[grid.bits]:
        scale = _rounded(2 * part * reach / (2 * half - 1))
        # The offset is the value of the integer ``half``: half a step above the middle.
        offset = (middle + scale.float() / 2).to(torch.bfloat16)
        integers = ((groups - offset.float()) / scale.float()).round_().clamp_(-half, half - 1)
        errors = (integers * scale.float() + offset.float() - groups).square_()
        loss = (errors if weights is None else errors * weights).sum(dim=2, keepdim=True)
        if not best:
            best = loss, integers, scale, offset
            continue
        better = loss < best[0]
        new = (loss, integers, scale, offset)
        best = tuple(torch.where(better, a, b) for a, b in zip(new, best, strict=True))
    _, integers, scale, offset = best
    unsigned = (integers.reshape(values.shape) + half).to(torch.uint8)
    planes = tuple(gathered(unsigned >> shift, bits) for bits, shift in _PLANES[grid.bits])
    return planes, scale.squeeze(2), offset.squeeze(2)


def _rounded(scale: torch.Tensor) -> torch.Tensor:
    """Scales in their own precision, none of them zero."""
    return scale.clamp_min(1e-12).to(torch.bfloat16)


# Of `packing_of`, for a block.
PACKING_BYTES = 4
AS_PUBLISHED = bytes(PACKING_BYTES)


def packing_of(layer: nn.Module) -> bytes:
    """What tells the values of a block's packed weights from others, in `PACKING_BYTES`.

    Not once they lie in the order in which something multiplies by them.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(layer.named_parameters()):
        if isinstance(weight, PackedWeight):
            digest.update(
                f"{name} {list(weight.shape)} {getattr(weight.packed, 'grid', '')}".encode()
            )
            for part in weight.packed.parts():
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()[:PACKING_BYTES]


class PackedWeight(torch.Tensor):
    """A frozen weight whose values are unpacked for each operation.

    Attributes:
        packed: its bits.
    """

    packed: Packed

    @staticmethod
    def __new__(cls, packed: Packed, dtype: torch.dtype) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, packed.shape, dtype=dtype, device=packed.device, requires_grad=False
        )
        made.packed = packed
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return PackedWeight(args[0].packed, args[0].dtype)
        unpacked = _pytree.tree_map_only(PackedWeight, PackedWeight.unpack, (args, kwargs or {}))
        return func(*unpacked[0], **unpacked[1])

    def __repr__(self, **_options: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, {self.packed.nbytes} bytes)"

    def unpack(self) -> torch.Tensor:
        """The weight itself, for a moment."""
        # Views of it are taken as those of this tensor, which knows of no inference mode.
        with torch.inference_mode(mode=False):
            return self.packed.unpack(self.dtype)


def storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """Where a tensor's bytes are."""
    if isinstance(tensor, PackedWeight):
        parts = list(tensor.packed.parts())
    elif (flatten := getattr(tensor, "__tensor_flatten__", None)) is not None:  # torchao's
        parts = [getattr(tensor, name) for name in flatten()[0]]
    elif tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    else:
        yield tensor.untyped_storage()
        return
    for part in parts:
        yield from storages(part)


def matrices(layer: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """What can be packed in a block, as (name, its module, the parameter's name there, itself)."""
    for path, module in layer.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.ndim < 2 or "bias" in name:
                continue
            if Grid(8, 0).fits(parameter.shape):
                yield f"{path}.{name}", module, name, parameter


def replace(module: nn.Module, name: str, packed: Packed, dtype: torch.dtype) -> None:
    """Put a packed weight in the place of a parameter."""
    module._parameters[name] = nn.Parameter(PackedWeight(packed, dtype), requires_grad=False)
