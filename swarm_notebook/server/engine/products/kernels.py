"""Multiplying tokens by a weight, with the kernel that is fastest on this machine.

With one token the time goes into reading the weight, and with a few it should hardly take longer.
Libraries do not always manage: `torch.nn.functional.linear` of 2 float32 tokens was seen to take
1.6 times as long as of 1, and that longer than the memory needs (MKL on an AMD EPYC); of 150 tokens
it takes a sixth longer than oneDNN with packed weights. So a server on a CPU gives the linear
layers of its blocks a forward of their own, which runs one of the kernels below. Which one, is
measured for each shape of weight and number of tokens, once that has been wanted for a while and
between the steps of sessions. Until then, and whenever gradients are wanted, it is `plain`.

Everything here belongs to the torch thread.
"""

from __future__ import annotations

import timeit
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import psutil
import torch
from torch import nn
from torch.nn import functional

# Numbers of tokens up to which kernels are measured by powers of two; all longer passes are taken
# to be like one of `LONG_TOKENS`.
MAX_TOKENS, LONG_TOKENS = 64, 160
# Measuring takes as long as a step or two: so many passes must have wanted it.
WANTED_PASSES = 12
# With fewer tokens the time goes into reading the weight, whatever its layout.
_PACKED_FROM = 3
_TRIES = 3
# Measured over weights of so many bytes, or they would all be in the processor's cache.
_SPREAD_BYTES = 64 << 20
# So many bytes of weights are packed at once, while sessions wait: about 10 ms.
_CHUNK_BYTES = 16 << 20
# Another kernel must be that much faster than `plain`: below it, runs on a busy machine differ.
_WORTH = 0.95

# Does a call in the torch thread, soon.
Later = Callable[[Callable[[], None]], None]


class Product:
    """The forward of one linear layer: ``[…, tokens, inputs]`` times ``[outputs, inputs]``.

    Attributes:
        pack: a copy of the weight in the order in which oneDNN reads it, if there is one.
    """

    __slots__ = ("_family", "bias", "pack", "weight")

    bias: torch.Tensor | None
    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, family: _Family):
        self.weight, self.bias, self._family = weight, bias, family
        self.pack: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # Kernels other than the model's own know no gradients.
        if torch.is_grad_enabled():
            return plain(x, self)
        return self._family.kernel(x.numel() // x.shape[-1])(x, self)

    def __deepcopy__(self, _memo: Any) -> Product:
        # A layer that is cloned around the same weight (for an adapter) multiplies as this one.
        return self

    def pack_weight(self) -> int:
        """Make the copy; how many bytes it takes."""
        if self.pack is None:
            self.pack = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
        return self.weight.numel() * self.weight.itemsize


class Kernel(Protocol):
    """One of the functions below."""

    def __call__(self, x: torch.Tensor, product: Product) -> torch.Tensor: ...


def plain(x: torch.Tensor, product: Product) -> torch.Tensor:
    """What the model does by itself."""
    return functional.linear(x, product.weight, product.bias)


def turned(x: torch.Tensor, product: Product) -> torch.Tensor:
    """The weight times the tokens instead of the other way around, for at least two of them."""
    flat = x.reshape(-1, x.shape[-1])
    tokens = flat.shape[0]
    if tokens == 1:
        flat = torch.cat([flat, flat])
    # Contiguous: the next weight wants it so.
    result = torch.mm(product.weight, flat.t()).t()[:tokens].contiguous()
    if product.bias is not None:
        result = result + product.bias
    return result.unflatten(0, x.shape[:-1])


def packed(x: torch.Tensor, product: Product) -> torch.Tensor:
    """OneDNN, with the copy of the weight."""
    return torch.ops.mkldnn._linear_pointwise(x, product.pack, product.bias, "none", [], "")


def install(layers: Iterable[nn.Module], later: Later) -> None:
    """Let the linear layers of some blocks multiply with the fastest kernel; on CPUs only.

    Args:
        later: runs what is measured, between the steps of sessions.
    """
    families: dict[tuple[torch.Size, torch.dtype], _Family] = {}
    for layer in layers:
        for module in layer.modules():
            # Those that inherit from it do something else.
            if type(module) is not nn.Linear or module.weight.device.type != "cpu":
                continue
            # Packed, by us or by a library.
            if type(module.weight.detach()) is not torch.Tensor:
                continue
            key = module.weight.shape, module.weight.dtype
            family = families.setdefault(key, _Family(later))
            vars(module)["forward"] = family.add(module)


class _Family:
    """The weights of one shape, and what multiplies by them."""

    def __init__(self, later: Later):
        self._later = later
        self._products: list[Product] = []
        self._kernels: dict[int, Kernel] = {}
        self._wanted: Counter[int] = Counter()

    def add(self, module: nn.Linear) -> Product:
        self._products.append(Product(module.weight, module.bias, self))
        return self._products[-1]

    def kernel(self, tokens: int) -> Kernel:
        """The fastest one for so many tokens, once it is measured; until then it asks for that."""
        size = LONG_TOKENS if tokens > MAX_TOKENS else 1 << (tokens - 1).bit_length()
        found = self._kernels.get(size)
        if found is not None:
            return found
        self._wanted[size] += 1
        if self._wanted[size] == WANTED_PASSES * len(self._products):
            self._later(lambda: self._choose(size))
        return plain

    def _choose(self, size: int) -> None:
        """Measure the kernels for this number of tokens."""
        weight = self._products[0].weight
        kernels: list[Kernel] = [plain, turned]
        if size >= _PACKED_FROM and self._can_pack():
            kernels.append(packed)
        spread = _SPREAD_BYTES // (weight.numel() * weight.itemsize) if size <= MAX_TOKENS else 1
        sample = self._products[: max(1, spread)]
        if packed in kernels:
            for product in sample:
                product.pack_weight()
        # Of its own generator: who shares the process draws the random numbers it would draw alone.
        noise = torch.randn(size, weight.shape[1], generator=torch.Generator())
        x = noise.to(weight.dtype)
        with torch.inference_mode():
            seconds = {kernel: _seconds(kernel, x, sample) for kernel in kernels}
        best = min(seconds, key=seconds.__getitem__)
        if seconds[best] >= _WORTH * seconds[plain]:
            best = plain
        if best is packed:
            self._pack(size)
            return
        self._kernels[size] = best
        if packed not in self._kernels.values():
            for product in sample:
                product.pack = None

    def _pack(self, size: int) -> None:
        """Pack some of the weights, and the others later; then multiply by them."""
        done = 0
        for product in self._products:
            if product.pack is None:
                if done >= _CHUNK_BYTES:
                    self._later(lambda: self._pack(size))
                    return
                done += product.pack_weight()
        self._kernels[size] = packed

    def _can_pack(self) -> bool:
        """Whether oneDNN takes these weights, and half of the free memory stays free with them."""
        weight = self._products[0].weight
        if weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return False
        missing = sum(product.pack is None for product in self._products)
        wanted = missing * weight.numel() * weight.itemsize
        return 2 * wanted <= psutil.virtual_memory().available


def _seconds(kernel: Kernel, x: torch.Tensor, products: Sequence[Product]) -> float:
    """Seconds for one product with each of the weights: the best of some tries."""

    def run() -> None:
        for product in products:
            kernel(x, product)

    return min(timeit.repeat(run, number=1, repeat=_TRIES))
