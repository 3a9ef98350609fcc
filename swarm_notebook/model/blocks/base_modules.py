"""The model's own modules under the adapters that PEFT has put around them."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn


def is_tuner(module: nn.Module) -> bool:
    """Whether PEFT made it; nothing is imported to find out."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def base_of(module: nn.Module) -> nn.Module:
    """The model's own module under its adapters."""
    while is_tuner(module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def own_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules inside of one, by name, without those of adapters."""
    for name, child in module._modules.items():
        if child is not None:
            inside, own = f"{path}.{name}" if path else name, base_of(child)
            yield inside, own
            yield from own_modules(own, inside)
