"""Which PEFT adapters take part when a model writes, and switching them off and on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any


def adapters(model: Any) -> tuple[list[str], bool]:
    """Names of the adapters that are active or switched off, and whether they are on.

    Prompt tuning and its kin, which put nothing into layers, count while their model is a
    `PeftModel`; they cannot be switched off here.
    """
    names: dict[str, None] = {}
    on = True
    for layer in _layers(model):
        names |= dict.fromkeys(layer.active_adapters)
        on = not layer.disable_adapters
    wrapped = getattr(model, "active_peft_config", None)
    if not names and getattr(wrapped, "is_prompt_learning", False):
        names[str(model.active_adapter)] = None
    return list(names), on


def switch(model: Any, on: bool) -> None:
    """Let the adapters in a model's layers take part or not, for all that use the model."""
    for layer in _layers(model):
        layer.enable_adapters(on)


def _layers(model: Any) -> Iterator[Any]:
    """The layers that PEFT has put into a model; none if nobody has imported it."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None:
        for module in model.modules():
            if isinstance(module, tuners.BaseTunerLayer):
                yield module
