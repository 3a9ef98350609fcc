"""The model's own modules under the adapters that PEFT has put around them."""

from __future__ import annotations

import sys

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
