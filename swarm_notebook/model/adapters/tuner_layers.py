"""What PEFT has put into a block, described so that a server can put the same together.

PEFT's layers compute with their parameters, with plain attributes (a scaling, which adapters are
active, which indices are tuned) and with modules inside of them. All of that is read off the
layers as they stand, whatever their type: so what somebody sets on a layer, and what PEFT made of
a config, count as they do locally. `server/adapters/layers.py` is the other side; there stands how
a description is written.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.base_modules import base_of, is_tuner
from swarm_notebook.model.blocks.placeholders import is_placeholder

# The parameters of a block's adapters, by block and name.
Weights = Mapping[int, Mapping[str, nn.Parameter]]

_TORCH_STATE = frozenset(vars(nn.Module()))
# What PEFT builds a layer with and does not compute with; and by whose hooks gradients change here.
_IDLE = frozenset({"kwargs"})
_IDLE_TYPES = (torch.device, torch.Generator, RemovableHandle)
# What PEFT tells its layers for one call, row by row, and how.
_BY_ROW = frozenset({"adapter_names", "alora_offsets"})


@dataclass(frozen=True)
class BlockLayers:
    """The layers of PEFT in one block.

    Attributes:
        text: their description as JSON, in which tensors have names.
        tensors: parameters and buffers by name.
        trained: the names of those that want a gradient.
        random: whether they may compute otherwise in training, as dropout does.
    """

    text: str
    tensors: Mapping[str, torch.Tensor]
    trained: frozenset[str]
    random: bool


def tuners_in(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """PEFT's layers by the names of what they are around, the outer one of several."""
    for name, child in module._modules.items():
        if child is None:
            continue
        inside = f"{path}.{name}" if path else name
        if is_tuner(child):
            yield inside, child
        yield from tuners_in(base_of(child), inside)


def row_options(tuners: list[nn.Module]) -> dict[str, list[Any]]:
    """What PEFT tells its layers for the present call, row by row.

    Raises:
        Unsupported: it tells them anything else, or some of them something else.
    """
    found: list[dict[str, list[Any]]] = []
    for tuner in tuners:
        for hook in tuner._forward_pre_hooks.values():
            told = hook.keywords if isinstance(hook, functools.partial) else {}
            if not told or not told.keys() <= _BY_ROW:
                what = ", ".join(sorted(told)) or "a forward pre-hook"
                raise Unsupported(
                    f"{what}: PEFT passes this to {type(tuner).__name__} for a single call, which "
                    "servers do not support; bring the blocks home: swarm.own(slice(None))"
                )
            if told not in found:
                found.append(told)
    if len(found) > 1:
        raise Unsupported(
            "PEFT passes different options to its layers in one call; bring the blocks home: "
            "swarm.own(slice(None))"
        )
    return {name: list(rows) for name, rows in found[0].items()} if found else {}


def describe(
    block: nn.Module, index: int, adapters: AbstractSet[str], wanted: AbstractSet[str]
) -> BlockLayers | None:
    """The layers of PEFT in a block; None if none of them does anything.

    Args:
        adapters: all that PEFT knows by name.
        wanted: those that take part.

    Raises:
        Unsupported: a layer keeps something that servers cannot have.
    """
    description = _Description(index, adapters, wanted)
    layers = {}
    for path, tuner in tuners_in(block):
        if tuner.disable_adapters:
            continue
        before = len(description.tensors)
        described = description.module(tuner, path, base_of(tuner))
        if len(description.tensors) > before:
            layers[path] = described
    if not layers:
        return None
    return BlockLayers(
        json.dumps(layers, separators=(",", ":")),
        description.tensors,
        frozenset(name for name, one in description.tensors.items() if one.requires_grad),
        description.random,
    )


class _Description:
    """Collects tensors while modules and values become JSON."""

    def __init__(self, index: int, adapters: AbstractSet[str], wanted: AbstractSet[str]):
        self._index, self._adapters, self._wanted = index, adapters, wanted
        self._names: dict[int, str] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.random = False

    def module(self, module: nn.Module, path: str, base: nn.Module) -> Any:
        """A module of an adapter, or the model's own in the midst of it."""
        if module is base:
            return "base"
        kind = type(module)
        own = kind.__module__.startswith(("torch.nn.modules.", "peft.tuners."))
        if not own and (kind is not type(base) or module._modules):
            self._refuse(path, f"a {kind.__name__} of its own")
        if module._forward_hooks or "forward" in vars(module):
            self._refuse(path, f"a {kind.__name__} with a hook or a forward of its own")
        parts: dict[str, Any] = {"class": f"{kind.__module__}.{kind.__qualname__}"}
        tables: dict[str, Any] = {"parameters": module._parameters, "buffers": module._buffers}
        for table, tensors in tables.items():
            found = {
                name: None if tensor is None else self._tensor(tensor, f"{path}.{name}")
                for name, tensor in self._chosen(tensors)
            }
            if found:
                parts[table] = found
        if not own:
            return {**parts, "class": "base"}
        children = {
            name: None if child is None else self.module(child, f"{path}.{name}", base)
            for name, child in self._chosen(module._modules)
        }
        if children:
            parts["modules"] = children
        self.random |= isinstance(module, nn.Dropout) and module.p > 0
        for name, value in vars(module).items():
            if name not in _TORCH_STATE and name not in _IDLE:
                found = self._value(value, f"{path}.{name}", base)
                parts.setdefault("attributes", {})[name] = found
                self.random |= ("dropout" in name or "sample" in name) and _any_set(value)
        return parts

    def _chosen(self, table: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
        """The entries of a table; if it is one by adapters, of those that take part."""
        if table and self._adapters >= table.keys():
            return [(name, value) for name, value in table.items() if name in self._wanted]
        return list(table.items())

    def _value(self, value: Any, path: str, base: nn.Module) -> Any:
        if isinstance(value, Enum):
            value = value.value
        if isinstance(value, _IDLE_TYPES):
            self.random |= isinstance(value, torch.Generator)
            return None
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, (list, tuple, set, frozenset, Mapping)):
            return self._values(value, path, base)
        return self._object(value, path, base)

    def _values(self, values: Any, path: str, base: nn.Module) -> Any:
        if isinstance(values, Mapping):
            pairs = [
                [self._value(key, path, base), self._value(item, f"{path}.{key}", base)]
                for key, item in self._chosen(values)
            ]
            return {"dict": pairs}
        ordered = sorted(values) if isinstance(values, (set, frozenset)) else values
        items = [self._value(item, path, base) for item in ordered]
        return items if isinstance(values, list) else {type(values).__name__: items}

    def _object(self, value: Any, path: str, base: nn.Module) -> Any:
        if isinstance(value, torch.Tensor):
            return {"tensor": self._tensor(value, path)}
        if isinstance(value, nn.Module):
            return {"module": self.module(value, path, base)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        kind = type(value)
        if not kind.__module__.startswith("peft.tuners.") or getattr(value, "__dict__", None):
            self._refuse(path, f"a {kind.__name__}")
        return {"object": f"{kind.__module__}.{kind.__qualname__}"}

    def _tensor(self, tensor: torch.Tensor, name: str) -> str:
        """The name of a tensor; one that several layers share has one."""
        if is_placeholder(tensor):
            self._refuse(name, "a weight of the block itself")
        if tensor.is_meta:
            raise Unsupported(
                f"{name} of block {self._index} has no values yet (low_cpu_mem_usage=True); load "
                "the adapter's weights first, or leave low_cpu_mem_usage out"
            )
        known = self._names.setdefault(id(tensor), name)
        self.tensors[known] = tensor
        return known

    def _refuse(self, path: str, what: str) -> NoReturn:
        raise Unsupported(
            f"block {self._index}: PEFT keeps {what} in {path}, which servers cannot have; use "
            f"another adapter type, or bring the block home: swarm.own({self._index})"
        )


def _any_set(value: Any) -> bool:
    """Whether a number, or one of those in a dict, is not zero."""
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(one, (bool, int, float)) and one for one in values)
