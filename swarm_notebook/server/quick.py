"""Long passes with the fastest product that the machine has (`linear`).

Pieces of prefill and forward requests run the decoder's own code, as they are; only the product
with a weight is another while they do. It was seen to take a sixth less time for 150 float32 tokens
(oneDNN with packed weights against MKL, on an AMD EPYC). Packing takes memory and some time: it is
done after some long passes, which show by which weights they multiply, a few weights at a time.

Everything here belongs to the torch thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from swarm_notebook.server import linear
from swarm_notebook.server.linear import LONG_TOKENS, MAX_TOKENS, Products

WANTED_PASSES = 8
# So many bytes of weights are packed at once, while sessions wait.
_CHUNK_BYTES = 16 << 20


class Quick:
    """Runs long passes quickly, when it pays and as soon as it can.

    Args:
        later: does a call in the torch thread, soon.
    """

    def __init__(self, products: Products, later: Callable[[Callable[[], None]], None]):
        self._products, self._later = products, later
        self._passes = 0
        self._looking = _Looking()
        self._swapping: _Swapping | None = None

    def during(self, tokens: int) -> AbstractContextManager[Any]:
        """To be held while a pass of so many tokens runs."""
        if tokens <= MAX_TOKENS:
            return nullcontext()
        if self._passes == WANTED_PASSES:
            return self._swapping or nullcontext()
        self._passes += 1
        if self._passes < WANTED_PASSES:
            return self._looking
        self._later(self._choose)
        return nullcontext()

    def _choose(self) -> None:
        """Find out for which weights it pays."""
        found = list(self._looking.weights.values())
        # Some are those of adapters, which come and go.
        self._looking.weights.clear()
        self._pack([weight for weight in found if _is_packed(self._products, weight)])

    def _pack(self, missing: Sequence[torch.Tensor]) -> None:
        """Pack some of the weights, and the others later."""
        size = count = 0
        while count < len(missing) and size < _CHUNK_BYTES:
            self._products.pack(missing[count])
            size += missing[count].numel() * missing[count].itemsize
            count += 1
        if rest := missing[count:]:
            self._later(lambda: self._pack(rest))
        elif missing:
            self._swapping = _Swapping(self._products)


class _Looking(TorchFunctionMode):
    """Notes by what is multiplied.

    Attributes:
        weights: by their addresses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self, function: Any, _types: Any, arguments: tuple = (), named: dict | None = None
    ) -> Any:
        if function is functional.linear and not named:
            self.weights[arguments[1].data_ptr()] = arguments[1]
        return function(*arguments, **(named or {}))


class _Swapping(TorchFunctionMode):
    """Multiplies by packed weights where that is worth it."""

    def __init__(self, products: Products):
        super().__init__()
        self._products = products

    def __torch_function__(
        self, function: Any, _types: Any, arguments: tuple = (), named: dict | None = None
    ) -> Any:
        if function is functional.linear and not named:
            x, weight, bias = (*arguments, None)[:3]
            if _is_packed(self._products, weight):
                return linear.packed(x, self._products.pack(weight), bias)
        return function(*arguments, **(named or {}))


def _is_packed(products: Products, weight: torch.Tensor) -> bool:
    return products.way(weight, LONG_TOKENS) is linear.packed
