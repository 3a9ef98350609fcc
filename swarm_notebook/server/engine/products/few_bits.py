"""Multiplying tokens by weights in few bits, without unpacking them where torch knows how.

A linear layer whose weight is a `PackedWeight` gets a forward of its own. For a few tokens it uses
torch's operators for 4 and 8 bits, which read the bits alone, and that for 4 also for 3 and 2. They
are for bfloat16, and in float32 many times slower than unpacking (AVX-512, torch 2.13: 940 us
against 119 us for 576 x 576). For more tokens it unpacks the weight for the moment and multiplies
as ever; from how many on, is measured. Gradients go through the unpacked weight, which is not kept
in between. On a GPU both are kernels of our own (`on_card`), which know 2, 3, 4 and 8 bits.

The operators' names are private and their layout is not documented: both are tried out at start,
and what does not give what unpacking gives is not used.

Everything here belongs to the torch thread.
"""

from __future__ import annotations

import bisect
import copy
import functools
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from swarm_notebook.checkpoint.packed import Grid, Packed, PackedGrid, PackedWeight, pack, replace
from swarm_notebook.server.engine.products import int4, on_card
from swarm_notebook.server.memory import heap

# Tokens of which it is measured whether an operator is faster than unpacking.
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_TRIES = 3

Operator = Callable[[torch.Tensor, Any], torch.Tensor]
Unpack = Callable[[Any, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Way:
    """How weights of one shape and grid are multiplied by.

    Attributes:
        operator: multiplies tokens by the bits as they are; None if nothing does.
        up_to: so many tokens; more are multiplied by the unpacked weight.
    """

    operator: Operator | None
    up_to: int
    unpack: Unpack


class PackedProduct:
    """The forward of a linear layer with a packed weight.

    Attributes:
        bias: the layer's.
    """

    __slots__ = ("_dtype", "_way", "bias", "packed")

    bias: torch.Tensor | None
    packed: Packed

    def __init__(self, packed: Packed, bias: torch.Tensor | None, dtype: torch.dtype, way: Way):
        self.packed, self.bias, self._dtype, self._way = packed, bias, dtype, way

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            result: torch.Tensor = _Product.apply(x, self)
            return result if self.bias is None else result + self.bias
        way = self._way
        if way.operator is not None and x.numel() <= way.up_to * x.shape[-1]:
            flat = way.operator(x.reshape(-1, x.shape[-1]), self.packed)
            result = flat.unflatten(0, x.shape[:-1])
            return result if self.bias is None else result + self.bias
        return functional.linear(x, self.weight(), self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedProduct:
        # A layer that is cloned around the same weight (for an adapter) multiplies as this one.
        parts = self.packed.parts()
        if not any(id(part) in memo for part in parts):
            return self
        packed = self.packed.around([memo.get(id(part), part) for part in parts])
        return PackedProduct(packed, copy.deepcopy(self.bias, memo), self._dtype, self._way)

    def weight(self) -> torch.Tensor:
        """Unpacked, for the moment."""
        return self._way.unpack(self.packed, self._dtype)


class _Product(torch.autograd.Function):
    """With gradients of the tokens; the weight is frozen, and unpacked again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: PackedProduct) -> torch.Tensor:
        ctx.product = product
        return functional.linear(x, product.weight())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.product.weight(), None


def install(layers: Iterable[nn.Module]) -> None:
    """Let the linear layers of some blocks multiply by their packed weights."""
    alike: dict[Any, list[tuple[nn.Linear, Packed]]] = {}
    for layer in layers:
        for module in layer.modules():
            # Those that inherit from it do something else.
            if type(module) is not nn.Linear or not isinstance(module.weight, PackedWeight):
                continue
            weight, dtype = module.weight, module.weight.dtype
            with heap.apart():
                packed = _arranged(weight.packed, dtype)
            if packed is not weight.packed:
                replace(module, "weight", packed, dtype)
            key = type(packed), packed.shape, packed.nbytes, dtype
            alike.setdefault(key, []).append((module, packed))
    for (*_, dtype), members in alike.items():
        way = _way([packed for _, packed in members], dtype)
        for module, packed in members:
            vars(module)["forward"] = PackedProduct(packed, module.bias, dtype, way)


def bits_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that hold the bits of a block's packed weights, as ``NAME.INDEX``."""
    return {
        f"{name}.weight.{index}": part
        for name, product in _products(layer)
        for index, part in enumerate(product.packed.parts())
    }


@contextmanager
def with_bits(
    layer: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """Let a block multiply by other tensors than `bits_of`; gives what else is among them."""
    rest, products = dict(tensors), [product for _, product in _products(layer)]
    own = [product.packed for product in products]
    names = iter(bits_of(layer))
    try:
        for product in products:
            parts = [rest.pop(next(names)) for _ in product.packed.parts()]
            product.packed = product.packed.around(parts)
        yield rest
    finally:
        for product, packed in zip(products, own, strict=True):
            product.packed = packed


def multiplies_all(layer: nn.Module) -> bool:
    """Whether all packed weights of a block are multiplied by here."""
    packed = sum(isinstance(weight, PackedWeight) for weight in layer.parameters())
    return packed == len(list(_products(layer)))


def _products(layer: nn.Module) -> Iterator[tuple[str, PackedProduct]]:
    for name, module in layer.named_modules():
        product = vars(module).get("forward")
        if isinstance(product, PackedProduct):
            yield name, product


def _way(alike: Sequence[Packed], dtype: torch.dtype) -> Way:
    """How to multiply by weights of one shape and grid."""
    one = alike[0]
    if isinstance(one, PackedGrid) and one.device.type == "cuda":
        if not on_card.unpacks(one, dtype):
            return Way(None, 0, PackedGrid.unpack)
        grids = [packed for packed in alike if isinstance(packed, PackedGrid)]
        return Way(on_card.multiply, on_card.choose(grids, dtype), on_card.unpack)
    operator = operator_for(one, dtype)
    up_to = 0 if operator is None else _crossover(operator, one, dtype)
    return Way(operator, up_to, type(one).unpack)


def _arranged(packed: Packed, dtype: torch.dtype) -> Packed:
    """In the order in which what multiplies by it reads it."""
    if len(packed.shape) != 2:
        return packed
    if packed.device.type == "cuda":
        return on_card.arranged(packed) if isinstance(packed, PackedGrid) else packed
    return (int4.arranged(packed) if dtype == torch.bfloat16 else None) or packed


def operator_for(packed: Packed, dtype: torch.dtype) -> Operator | None:
    """What multiplies by the bits as they are on a CPU; None if nothing does."""
    if isinstance(packed, (int4.OfGrid, int4.OfFile)):
        return int4.multiply
    if not isinstance(packed, PackedGrid) or packed.grid.bits != 8 or not _works():
        return None
    if dtype != torch.bfloat16 or packed.device.type != "cpu" or len(packed.shape) != 2:
        return None
    return _by_eight_bits


def _by_eight_bits(x: torch.Tensor, packed: PackedGrid) -> torch.Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, packed.planes[0], packed.scales.view(-1))


def _crossover(operator: Operator, packed: Packed, dtype: torch.dtype) -> int:
    """The number of tokens up to which the operator is faster than unpacking.

    Looked for by halves: what oneDNN compiles for each size that is tried stays in memory.
    """

    def faster(size: int) -> bool:
        x = torch.randn(size, packed.shape[1], generator=torch.Generator()).to(dtype)
        with torch.inference_mode():
            return _seconds(partial(operator, x, packed)) <= _seconds(partial(_unpacked, packed, x))

    slower = bisect.bisect_left(_SIZES, True, key=lambda size: not faster(size))
    return _SIZES[slower - 1] if slower else 0


def _unpacked(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, packed.unpack(x.dtype))


def _seconds(work: Callable[[], object]) -> float:
    return min(timeit.repeat(work, number=1, repeat=_TRIES))


@functools.cache
def _works() -> bool:
    """Whether torch's operator for 8 bits is there, and gives what unpacking gives."""
    noise = torch.Generator().manual_seed(0)
    packed = pack(torch.randn(128, 128, generator=noise), Grid(8, 0))
    return int4.agrees(_by_eight_bits, lambda: packed, packed.unpack(torch.float32))
