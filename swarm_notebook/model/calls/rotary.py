"""What the decoder's own rotary modules were asked, here in the notebook.

They run in every call, just as on a local model. Servers have theirs, and need to know two things:

- by which length those that depend on one go (``dynamic``, ``longrope``): a server sees a part of
  the tokens, and the calls of others; ``dynamic`` ones remember the longest call before;
- at which positions a block is that somebody calls by itself, with cosines and sines instead.

And they must be what the servers' are: one that was changed or exchanged here would have no effect.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.intact import has_other_forward

# A model that was converted to bfloat16 has its frequencies rounded to 8 bits.
_ROUNDED = 2**-7


class Rotations:
    """The rotary modules of a decoder beside its blocks.

    Attributes:
        count: how often they were asked; compiled ones are not seen.
    """

    count: int

    def __init__(self, decoder: nn.Module, blocks: Collection[nn.Module]):
        inside = {id(module) for block in blocks for module in block.modules()}
        self._owners: list[tuple[nn.Module, str, Any]] = [
            (owner, name, module)
            for owner in decoder.modules()
            for name, module in owner._modules.items()
            if hasattr(module, "rope_type") and id(module) not in inside
        ]
        self._modules = [module for _, _, module in self._owners]
        self._plans = [_plan(module) for module in self._modules]
        self.count = 0
        # Positions on the CPU, and the version: by cosines, by sines; by positions where they were.
        self._asked, self._ids = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        for module in self._modules:
            module.register_forward_hook(self._note, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotations:
        memo[id(self)] = twin = object.__new__(Rotations)
        twin._owners = copy.deepcopy(self._owners, memo)
        twin._modules = [module for _, _, module in twin._owners]
        twin._plans, twin.count = self._plans, 0
        twin._asked, twin._ids = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        return twin

    def _note(
        self, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        if torch.compiler.is_compiling():
            return
        self.count += 1
        ids = inputs[1] if len(inputs) > 1 else named.get("position_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            return
        here = self.here(ids)
        for tensor in _tensors(output):
            self._asked[tensor] = here, _version(tensor)

    def here(self, ids: torch.Tensor | None) -> torch.Tensor | None:
        """Position ids on the CPU: a GPU is asked for them once in a call."""
        if ids is None:
            return None
        known = self._ids.get(ids)
        if known is not None and known[1] == _version(ids) and not ids.is_inference():
            return known[0]
        copied: torch.Tensor = ids.detach().to("cpu", torch.int64, copy=True)
        self._ids[ids] = copied, _version(ids)
        return copied

    def check(self) -> None:
        """Compare the modules with what they were.

        Raises:
            Unsupported: one was exchanged, or turns otherwise.
        """
        for (owner, name, module), plan in zip(self._owners, self._plans, strict=True):
            exchanged = owner._modules.get(name) is not module
            if exchanged or has_other_forward(module) or not _alike(_plan(module), plan):
                _refuse(name)

    def positions(self, embeddings: Any) -> torch.Tensor | None:
        """The position ids ``[batch or 1, length]`` for which these embeddings were made here.

        None for embeddings that the model's own modules have not made, or that were changed since.
        """
        tensors = list(_tensors(embeddings))
        found = [self._asked.get(tensor) for tensor in tensors]
        for tensor, known in zip(tensors, found, strict=True):
            if known is None or known[1] != _version(tensor) or known[0] is not found[0][0]:
                return None
        return found[0][0] if found else None

    def length(self, last: int) -> int | None:
        """The length that rotary embeddings go by in a call; None if it makes no difference.

        To be asked after they have run.

        Args:
            last: the largest position of the call, plus one.

        Raises:
            Unsupported: some of them go by another one than others.
        """
        found = {
            length
            for module in self._modules
            for layer, kind in _kinds(module)
            if (length := _length(module, layer, kind, last)) is not None
        }
        if len(found) > 1:
            raise Unsupported(
                "blocks with different kinds of rotary embeddings that depend on the length "
                f"({sorted(found)}) beyond the length that the model was made for; bring the "
                "blocks home: swarm.own(slice(None))"
            )
        return next(iter(found), None)


def _plan(module: Any) -> dict[str, Any]:
    """The frequencies and factors of a module; those that depend on a length change by themselves.

    In float32, whatever the model was converted to.
    """
    if any("dynamic" in kind or kind == "longrope" for _, kind in _kinds(module)):
        return {}
    values: dict[str, Any] = {
        name: tensor.detach().to("cpu", torch.float32, copy=True)
        for name, tensor in module._buffers.items()
        if tensor is not None and not tensor.is_meta
    }
    factors = {name: value for name, value in vars(module).items() if type(value) is float}
    return values | factors


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(torch.as_tensor(one[name]), torch.as_tensor(other[name]), rtol=_ROUNDED)
        for name in one
    )


def _refuse(name: str) -> NoReturn:
    raise Unsupported(
        f"{name} was changed or replaced, but servers rotate keys and queries by their own; put it "
        "back, or bring the blocks home: swarm.own(slice(None))"
    )


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return (part for part in parts if isinstance(part, torch.Tensor))


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _kinds(module: Any) -> list[tuple[str | None, str]]:
    """The kinds of rotary embeddings of a module: one, or one for each kind of block."""
    kinds = module.rope_type
    return list(kinds.items()) if isinstance(kinds, dict) else [(None, kinds)]


def _length(module: Any, layer: str | None, kind: str, last: int) -> int | None:
    # As in transformers' `dynamic_rope_update`.
    if "dynamic" in kind:
        cached = module.max_seq_len_cached
        if layer is not None:
            cached = getattr(module, f"{layer}_max_seq_len_cached", cached)
        return int(cached) if cached > module.original_max_seq_len else None
    if kind == "longrope":
        parameters = module.config.rope_parameters
        parameters = parameters if layer is None else parameters[layer]
        original: int = parameters["original_max_position_embeddings"]
        # One for all lengths beyond it, as they turn alike: passes can be replayed together.
        return original + 1 if last > original else None
    return None
