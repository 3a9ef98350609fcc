"""Which blocks consist of the same operations, on weights of their own."""

from __future__ import annotations

import enum
import functools
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn

# What differs between blocks that are alike: transformers' word for their number.
_NUMBER = "layer_idx"


def likeness(layer: nn.Module, config: dict[str, Any]) -> Hashable:
    """The same one for blocks that compute in the same way.

    Whatever cannot be compared by value (functions, objects) has to be the same object.

    Args:
        config: of a decoder with this block alone.
    """
    modules = [
        (name, type(module), _tensors(module), _attributes(module))
        for name, module in layer.named_modules()
    ]
    return repr(sorted(config.items(), key=str)), tuple(modules)


def named_tensors(layer: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a block."""
    yield from layer.named_parameters(remove_duplicate=False)
    yield from layer.named_buffers(remove_duplicate=False)


def _tensors(module: nn.Module) -> Hashable:
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return tuple((name, tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in own)


def _attributes(module: nn.Module) -> Hashable:
    """What a module knows besides its tensors and children."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    own.pop(_NUMBER, None)
    return tuple((name, _by_value(value)) for name, value in sorted(own.items()))


def _by_value(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(_by_value(each) for each in value)
    if isinstance(value, functools.partial):
        return id(value.func), _by_value(value.args), _by_value(sorted(value.keywords.items()))
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype, enum.Enum))
    return repr(value) if plain else id(value)
