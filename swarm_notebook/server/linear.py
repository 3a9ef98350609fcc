"""Multiplying tokens by a weight, in the way that is fastest on this machine.

With one token the time goes into reading the weight, and with a few it should hardly take longer.
Libraries do not always manage: `torch.nn.functional.linear` of 2 float32 tokens was seen to take
1.6 times as long as of 1, and that longer than the memory needs (MKL on an AMD EPYC). So a server
measures, for each shape of weight and number of tokens (`graphs`, and `quick` for long passes), the
ways that give the same result:

- `plain`: what the model does.
- `turned`: the weight times the tokens instead of the other way around, for at least two of them.
- `packed`: oneDNN, with a copy of the weight in the order in which it is read. The copies take as
  much memory as the weights; they are made if half of what is free then stays free.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

import psutil
import torch
from torch import nn
from torch.nn import functional

# What is measured token by token; all longer passes are like one of `LONG_TOKENS`.
MAX_TOKENS, LONG_TOKENS = 64, 160
# With fewer tokens there is no library that has much to gain from another order.
_PACKED_FROM = 3
_TRIES = 3
# Weights of so many bytes are multiplied in turn, or they would all be in the processor's cache.
_SPREAD_BYTES = 64 << 20
# A way must be that much faster than the plain one.
_WORTH = 0.95


class Way(Protocol):
    """One of the functions below."""

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor: ...


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``[…, tokens, inputs]`` times ``[outputs, inputs]``."""
    return functional.linear(x, weight, bias)


def turned(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `plain`; the weight comes first."""
    flat = x.reshape(-1, x.shape[-1])
    tokens = flat.shape[0]
    if tokens == 1:
        flat = torch.cat([flat, flat])
    # Contiguous: the next weight wants it so.
    result = torch.mm(weight, flat.t()).t()[:tokens].contiguous()
    if bias is not None:
        result = result + bias
    return result.unflatten(0, x.shape[:-1])


def packed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `plain`; ``weight`` comes from `Products.pack`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def weights_of(layer: nn.Module) -> list[torch.Tensor]:
    """What the tokens in a block are multiplied by."""
    return [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]


class Products:
    """How to multiply by the weights of a server's blocks.

    Args:
        weights: all of them that are matrices.
    """

    def __init__(self, weights: Iterable[torch.Tensor]):
        self._weights: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for weight in weights:
            if weight.ndim == 2:
                self._weights[weight.shape].append(weight.detach())
        self._ways: dict[tuple[torch.Size, int], Way] = {}
        self._known = {weight.data_ptr() for same in self._weights.values() for weight in same}
        self._packs: dict[int, torch.Tensor] = {}

    @classmethod
    def of(cls, layers: Iterable[nn.Module]) -> Products:
        """Those of some blocks."""
        return cls(weight for layer in layers for weight in layer.parameters())

    def way(self, weight: torch.Tensor, tokens: int) -> Way:
        """The fastest way to multiply so many tokens by a weight, by trying those of its shape."""
        if weight.data_ptr() not in self._known:
            return plain
        key = weight.shape, tokens
        if key not in self._ways:
            self._ways[key] = self._fastest(self._weights[weight.shape], tokens)
        return self._ways[key]

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The copy of a weight for `packed`; made when it is first wanted."""
        key = weight.data_ptr()
        if key not in self._packs:
            self._packs[key] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        return self._packs[key]

    def can_pack(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether oneDNN takes these weights, and there is room for their copies."""
        if weights[0].dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return False
        missing = [weight for weight in weights if weight.data_ptr() not in self._packs]
        wanted = sum(weight.numel() * weight.itemsize for weight in missing)
        return 2 * wanted <= psutil.virtual_memory().available

    def _fastest(self, weights: Sequence[torch.Tensor], tokens: int) -> Way:
        first = weights[0]
        if first.device.type != "cpu":
            return plain
        ways: list[Way] = [plain, turned]
        if tokens >= _PACKED_FROM and self.can_pack(weights):
            ways.append(packed)
        spread = _SPREAD_BYTES // (first.numel() * first.itemsize) if tokens <= MAX_TOKENS else 1
        sample = weights[: max(1, spread)]
        packs = [self.pack(weight) for weight in sample] if packed in ways else []
        x = torch.randn(1, tokens, first.shape[1]).to(first.dtype)
        seconds = {way: _seconds(way, x, packs if way is packed else sample) for way in ways}
        best = min(seconds, key=seconds.__getitem__)
        found = best if seconds[best] < _WORTH * seconds[plain] else plain
        if found is not packed and not self._packs_used(first.shape):
            for weight in sample:
                self._packs.pop(weight.data_ptr(), None)
        return found

    def _packs_used(self, shape: torch.Size) -> bool:
        return any(way is packed for (of, _), way in self._ways.items() if of == shape)


def _seconds(way: Way, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> float:
    """Seconds for one product with each of the weights: the best of some tries."""
    best = math.inf
    for _ in range(_TRIES):
        began = time.perf_counter()
        for weight in weights:
            way(x, weight)
        best = min(best, time.perf_counter() - began)
    return best
