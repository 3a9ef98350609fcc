"""PEFT's layers as a notebook describes them, put together around the real weights.

A description says of which modules a layer consists, and what is in them. Of the classes, only
PEFT's layers and torch's plain modules are taken; none of their constructors runs, nothing is
imported for it, and no attribute may be callable or hide one of the class. So all that a peer
gets to run is PEFT's own ``forward``, with values of its choice. What these can do is bounded:

- whole numbers are no larger than a block's largest side: layers make tensors of sizes in their
  attributes, and so none that is larger than a square weight of that side;
- nothing is merged or switched off in there, which is when PEFT writes to weights;
- whole numbers in tensors are indices, and torch checks those on a CPU only: elsewhere they are
  refused.

A module is ``"base"`` (the model's own, around which the layer is), or ``{"class", "attributes",
"modules", "parameters", "buffers"}``, tensors by name or null. With the class ``"base"`` it is one
like the model's own with other tensors. A value is null, a bool, number or string, a list, or one
of ``{"dict": [[key, value]]}``, ``{"tuple": []}``, ``{"set": []}``, ``{"tensor": name}``,
``{"module": module}``, ``{"dtype": name}``, ``{"float": "inf"}``, ``{"object": class}`` (without
state).
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from swarm_notebook.errors import BadRequest

# LoRA around all linear layers of 126 blocks takes 1.6 MB (measured: 1.8 kB a layer). Read by
# Python, a hostile text takes some twenty times its bytes for a moment.
MAX_TEXT_BYTES = 4 << 20
MAX_DEPTH = 16
_MAX_STRING = 512
_SHOWN = 120
# No block has a side so small that settings such as a number of frequencies would be beyond it.
_LEAST_SIDE = 1 << 12

_COLLECTIONS: Mapping[str, type] = {
    "dict": dict,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}
_TORCH = frozenset(
    f"torch.nn.modules.{name}"
    for name in ["activation", "container", "dropout", "linear", "sparse"]
)
_TORCH_STATE = frozenset(vars(nn.Module()))
_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class BlockDescription:
    """What is in one block.

    Attributes:
        layers: descriptions by the names of what they are around.
        tensors: by the name in the block, the name in the file.
        trained: names in the block of what wants gradients.
    """

    layers: Mapping[str, Any]
    tensors: Mapping[str, str]
    trained: frozenset[str]


def parse_description(
    text: bytes, blocks: tuple[int, int], tensors: Mapping[str, torch.Tensor], peft: str
) -> dict[int, BlockDescription]:
    """The form of a description, by block.

    Args:
        blocks: for which it may be.
        tensors: what came with it.
        peft: the version that is installed here.

    Raises:
        BadRequest: it is none, or names blocks or tensors that are not there.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise BadRequest(f"adapter: a description of {len(text)} bytes, at most {MAX_TEXT_BYTES}")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"adapter: the description is not JSON ({error})") from None
    if not isinstance(whole, dict) or not isinstance(whole.get("blocks"), dict):
        raise BadRequest("adapter: the description has no blocks")
    theirs = str(whole.get("peft"))[:_SHOWN]
    if theirs.split(".")[:2] != peft.split(".")[:2]:
        raise BadRequest(
            f"adapter: the notebook has peft {theirs}, this server {peft}; install the same, or "
            "bring the blocks home: swarm.own(slice(None))"
        )
    return dict(
        _parse_block(number, block, blocks, tensors) for number, block in whole["blocks"].items()
    )


def _parse_block(
    number: str, block: Any, blocks: tuple[int, int], tensors: Mapping[str, torch.Tensor]
) -> tuple[int, BlockDescription]:
    index = int(number) if number.isdecimal() and len(number) < 9 else -1
    if not blocks[0] <= index < blocks[1] or not isinstance(block, dict):
        raise BadRequest(f"adapter: {number[:_SHOWN]!r} is not one of the blocks {list(blocks)}")
    layers, names, trained = (block.get(key) for key in ("layers", "tensors", "trained"))
    if not isinstance(layers, dict) or not isinstance(names, dict):
        raise BadRequest(f"adapter: block {index} has no layers or no tensors")
    for name, source in names.items():
        if not isinstance(source, str) or source not in tensors:
            raise BadRequest(f"adapter: {name[:_SHOWN]!r} of block {index} did not come")
    if not isinstance(trained, list) or not all(
        isinstance(name, str) and name in names and tensors[names[name]].is_floating_point()
        for name in trained
    ):
        raise BadRequest(f"adapter: block {index} trains what it has not")
    return index, BlockDescription(layers, names, frozenset(trained))


class Builder:
    """Puts the layers of one block together.

    Args:
        block: a clone of the block; its modules are replaced by the layers around them.
        where: how errors name it.
        tensors: by name in the block.
        trained: names of those that want gradients.

    Attributes:
        places: for every tensor, the objects that hold it now.
        layers: the layers by the names of what they are around.
        own: the modules that belong to the adapter.
    """

    def __init__(
        self,
        block: nn.Module,
        where: str,
        tensors: Mapping[str, torch.Tensor],
        trained: frozenset[str],
    ):
        self._block, self._where, self._tensors, self._trained = block, where, tensors, trained
        sides = [side for weight in block.parameters() for side in weight.shape]
        self._largest = max(_LEAST_SIDE, *sides)
        self._parameters: dict[str, nn.Parameter] = {}
        self.places: dict[str, list[torch.Tensor]] = {name: [] for name in tensors}
        self.layers: dict[str, nn.Module] = {}
        self.own: list[nn.Module] = []

    def build(self, layers: Mapping[str, Any]) -> None:
        """Put in all the layers.

        Raises:
            BadRequest: something in the description is not accepted.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        modules = dict(self._block.named_modules())
        # From the inside out: a layer may be around a module with layers in it.
        for path in sorted(layers, key=lambda path: -path.count(".")):
            base = modules.get(path)
            if base is None or not path:
                self._refuse(f"there is no module {path[:_SHOWN]!r}")
            layer = self._module(layers[path], base, 0)
            if not isinstance(layer, BaseTunerLayer):
                self._refuse(f"{path}: a {type(layer).__name__} is no layer of PEFT")
            parent, _, name = path.rpartition(".")
            modules[parent]._modules[name] = layer
            self.layers[path] = layer

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that want gradients, by name."""
        names = sorted(self._trained & self._parameters.keys())
        return {name: self._parameters[name] for name in names}

    def _module(self, described: Any, base: nn.Module, depth: int) -> nn.Module:
        if described == "base":
            return base
        if not isinstance(described, dict) or depth > MAX_DEPTH:
            self._refuse("no description of a module, or one too deep")
        word = described.get("class")
        if word == "base":
            module = copy.copy(base)
            for table in ("_parameters", "_buffers", "_modules"):
                module.__dict__[table] = dict(module.__dict__[table])
        else:
            kind = self._class(word)
            if not issubclass(kind, nn.Module):
                self._refuse(f"{str(word)[:_SHOWN]} is no module")
            module = kind.__new__(kind)
            nn.Module.__init__(module)
            for name, value in self._table(described, "attributes").items():
                self._set_attribute(module, name, value, base, depth)
            for name, child in self._table(described, "modules").items():
                made = None if child is None else self._module(child, base, depth + 1)
                module._modules[self._key(name)] = made
        for name, source in self._table(described, "parameters").items():
            made_of = None if source is None else self._parameter(source)
            module._parameters[self._key(name)] = made_of
        for name, source in self._table(described, "buffers").items():
            module._buffers[self._key(name)] = None if source is None else self._tensor(source)
        self.own.append(module)
        return module.eval() if module is not base else module

    def _set_attribute(
        self, module: nn.Module, name: str, value: Any, base: nn.Module, depth: int
    ) -> None:
        hidden = getattr(type(module), name, None)
        if not name.isidentifier() or name in _TORCH_STATE or name[:2] == "__" or callable(hidden):
            self._refuse(f"attribute {name[:_SHOWN]!r} of {type(module).__name__}")
        if name in ("merged_adapters", "_disable_adapters") and value not in ([], False):
            self._refuse(f"{name}: adapters are neither merged nor switched off on servers")
        module.__dict__[name] = self._value(value, base, depth + 1)

    def _value(self, value: Any, base: nn.Module, depth: int) -> Any:
        if depth > MAX_DEPTH:
            self._refuse("values too deep in each other")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, float):
            return value
        if isinstance(value, int):
            if abs(value) > self._largest:
                self._refuse(
                    f"the number {str(value)[:_SHOWN]}, accepted are {self._largest} and less"
                )
            return value
        if isinstance(value, str):
            if len(value) > _MAX_STRING:
                self._refuse(f"a text of {len(value)} characters, at most {_MAX_STRING}")
            return value
        if isinstance(value, list):
            return [self._value(item, base, depth + 1) for item in value]
        if not isinstance(value, dict) or len(value) != 1:
            self._refuse("no value")
        ((tag, inside),) = value.items()
        return self._tagged(tag, inside, base, depth)

    def _tagged(self, tag: str, inside: Any, base: nn.Module, depth: int) -> Any:
        made: Any = None
        if tag in _COLLECTIONS and isinstance(inside, list):
            made = self._collection(tag, inside, base, depth)
        elif tag == "tensor":
            made = self._tensor(inside)
        elif tag == "module":
            made = self._module(inside, base, depth + 1)
        elif tag == "dtype" and inside in _DTYPES:
            made = getattr(torch, inside)
        elif tag == "float" and inside in ("inf", "-inf", "nan"):
            made = float(inside)
        elif tag == "object":
            kind = self._class(inside)
            if issubclass(kind, nn.Module) or not kind.__module__.startswith("peft.tuners."):
                self._refuse(f"an object of {kind.__name__}")
            made = object.__new__(kind)
        else:
            self._refuse(f"a value of the kind {tag[:_SHOWN]!r}")
        return made

    def _collection(self, tag: str, inside: list[Any], base: nn.Module, depth: int) -> Any:
        if tag != "dict":
            made: Any = _COLLECTIONS[tag]
            return made(self._hashable(self._value(item, base, depth + 1)) for item in inside)
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in inside):
            self._refuse("a dict of no pairs")
        pairs = [[self._value(part, base, depth + 1) for part in pair] for pair in inside]
        return {self._hashable(key): value for key, value in pairs}

    def _class(self, word: Any) -> type:
        """A class by its name, if it is among those that are taken; nothing is imported."""
        from peft.tuners.tuners_utils import BaseTuner

        room, _, name = str(word)[:_SHOWN].rpartition(".")
        known = room in _TORCH or room.startswith("peft.tuners.")
        kind = vars(sys.modules.get(room, object)).get(name) if known else None
        if not isinstance(kind, type) or kind.__module__ != room or issubclass(kind, BaseTuner):
            self._refuse(f"class {str(word)[:_SHOWN]!r}")
        return kind

    def _tensor(self, name: Any) -> torch.Tensor:
        if not isinstance(name, str) or name not in self._tensors:
            self._refuse(f"tensor {str(name)[:_SHOWN]!r} did not come")
        made = self._tensors[name].detach()
        self.places[name].append(made)
        return made

    def _parameter(self, name: Any) -> nn.Parameter:
        known = self._parameters.get(name) if isinstance(name, str) else None
        if known is None:
            tensor = self._tensor(name)
            known = nn.Parameter(tensor, requires_grad=name in self._trained)
            self.places[name][-1] = known
            self._parameters[name] = known
        return known

    def _table(self, described: dict[str, Any], key: str) -> dict[str, Any]:
        table = described.get(key, {})
        if not isinstance(table, dict):
            self._refuse(f"{key} of no names")
        return table

    def _key(self, name: str) -> str:
        """A name in one of torch's tables."""
        if not name or "." in name or len(name) > _MAX_STRING:
            self._refuse(f"{name[:_SHOWN]!r} is no name")
        return name

    def _hashable(self, value: Any) -> Any:
        try:
            hash(value)
        except TypeError:
            self._refuse("a key that is none")
        return value

    def _refuse(self, what: str) -> NoReturn:
        raise BadRequest(f"adapter, {self._where}: {what}")
