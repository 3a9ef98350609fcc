"""Multiplying a few tokens by a weight, in the way that is fastest on this machine.

With one token the time goes into reading the weight, and with a few it should hardly take longer.
Libraries do not always manage: `torch.nn.functional.linear` of 2 float32 tokens was seen to take
1.6 times as long as of 1, and that longer than the memory needs (MKL on an AMD EPYC). So a server
measures, for each shape of weight and number of tokens, the ways that give the same result:

- `plain`: what the model does.
- `turned`: the weight times the tokens instead of the other way around, for at least two of them.
- `packed`: oneDNN, with a copy of the weight in the order in which it is read. The copies take as
  much memory as the weights; they are made if half of what is free then stays free.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

# From so many tokens on reading a weight in any order costs less than multiplying by it.
MAX_TOKENS = 64
# With fewer tokens there is no library that has much to gain from another order.
_PACKED_FROM = 3
_TRIES = 3
# Weights of so many bytes are multiplied in turn, or they would all be in the processor's cache.
_SPREAD_BYTES = 64 << 20
# A way must be that much faster than the plain one.
_WORTH = 0.95

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


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
    return result.view(*x.shape[:-1], weight.shape[0])


@functools.cache
def _onednn() -> Callable[..., torch.Tensor]:
    """The product of oneDNN in a form that can be recorded: its operator takes a list."""

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    return torch.jit.script(product)


def packed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `plain`; ``weight`` comes from `Packs`."""
    return _onednn()(x, weight, bias)


class Packs:
    """Copies of weights for `packed`, made when they are first wanted."""

    def __init__(self) -> None:
        self._packs: dict[int, torch.Tensor] = {}

    def allow(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether there is a way to pack these weights, and room for the copies."""
        first = weights[0]
        if first.dtype != torch.float32 or first.device.type != "cpu":
            return False
        if not torch.backends.mkldnn.is_available():
            return False
        missing = [weight for weight in weights if weight.data_ptr() not in self._packs]
        wanted = sum(weight.numel() * weight.itemsize for weight in missing)
        return 2 * wanted <= psutil.virtual_memory().available

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The packed copy of a weight."""
        key = weight.data_ptr()
        if key not in self._packs:
            self._packs[key] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        return self._packs[key]


def fastest(
    weights: Sequence[torch.Tensor], tokens: int, packs: Packs, bias: torch.Tensor | None = None
) -> Way:
    """The way to multiply ``tokens`` tokens by weights of one shape, by trying them out."""
    first = weights[0]
    if tokens > MAX_TOKENS or first.device.type != "cpu":
        return plain
    ways: list[Way] = [plain, turned]
    if tokens >= _PACKED_FROM and packs.allow(weights):
        ways.append(packed)
    sample = weights[: max(1, _SPREAD_BYTES // (first.numel() * first.itemsize))]
    x = torch.randn(1, tokens, first.shape[1]).to(first.dtype)
    seconds = {way: _seconds(way, x, sample, bias, packs) for way in ways}
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < _WORTH * seconds[plain] else plain


def _seconds(
    way: Way,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    packs: Packs,
) -> float:
    """Seconds for one product with each of the weights: the best of some tries."""
    operands: list[Any] = [packs.of(weight) for weight in weights] if way is packed else [*weights]
    best = float("inf")
    for _ in range(_TRIES):
        began = time.perf_counter()
        for weight in operands:
            way(x, weight, bias)
        best = min(best, time.perf_counter() - began)
    return best
