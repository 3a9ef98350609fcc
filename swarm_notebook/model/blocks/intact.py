"""Whether remote blocks are still built as their servers have them.

A remote block runs elsewhere as a whole. Whatever is exchanged inside of it here (a module, a
``forward``, also that of a class, an activation, a number such as an attention's scaling, a
function of attention) would be without effect, so it is refused at the next use, with the way out.
Adapters of PEFT are no such change: they travel.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.base_modules import base_of, is_tuner, own_modules
from swarm_notebook.model.blocks.placeholders import is_placeholder

# nnsight plants these for good on every module that it wraps; they only listen.
_LISTENERS = "nnsight."
_PLAIN = (int, float, str, bool, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def refuse_export(block: int) -> None:
    """Refuse to become a part of a program that is exported.

    Raises:
        Unsupported: torch exports or traces.
    """
    if torch.compiler.is_exporting() or torch._C._is_tracing():
        raise Unsupported(
            f"torch.export: block {block} runs on servers and cannot be part of a program; export "
            "the local model, or bring all blocks home: swarm.own(slice(None))"
        )


def refuse_transforms(block: int) -> None:
    """Refuse to become a part of a function that is transformed.

    Raises:
        Unsupported: the call is inside of `torch.func`, or of forward-mode differentiation.
    """
    if torch.compiler.is_dynamo_compiling():
        return  # it asks again when it runs, and has no true answer before
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if forward_mode or torch._C._functorch.peek_interpreter_stack() is not None:
        raise Unsupported(
            f"torch.func (vmap, grad, jvp, …) and forward-mode derivatives: block {block} runs on "
            "servers, which know batches and backward passes; pass a batch, use "
            "torch.autograd.grad, or bring all blocks home: swarm.own(slice(None))"
        )


def dropouts(block: nn.Module) -> Iterator[str]:
    """The names of what in a block drops something in training; an adapter's dropout travels."""
    for name, module in own_modules(block):
        if isinstance(module, nn.Dropout) and module.p > 0:
            yield name
        for own, value in vars(module).items():
            if "dropout" in own and isinstance(value, float) and value > 0:
                yield f"{name}.{own}"


class BlockPlan:
    """How a block is built: its modules by name, and what they compute with besides weights."""

    def __init__(self, block: nn.Module):
        self._values = {name: _values(module) for name, module in block.named_modules()}
        self._classes = {name: _layer_class(module) for name, module in block.named_modules()}
        self._called = {kind: _called_by(kind) for kind in set(self._classes.values())}
        self._children = {
            name: tuple(module._modules.items()) for name, module in block.named_modules()
        }
        self._note(block)

    def check(self, index: int, block: nn.Module, *, thorough: bool) -> None:
        """Compare a block with what it was.

        Args:
            thorough: look at plain attributes, too; else a quick look, for steps that take
                milliseconds.

        Raises:
            Unsupported: something in it was exchanged.
        """
        if not thorough and self._as_it_was():
            return
        if thorough:
            self._check_values(index, "", block)
        waiting = [("", block)]
        while waiting:
            name, module = waiting.pop()
            children, planned = module._modules, self._children[name]
            if len(children) != len(planned):
                extra = children.keys() ^ dict(planned).keys()
                _refuse(index, _join(name, min(extra)), "was added or removed")
            for child, original in planned:
                if original is not None:
                    path = _join(name, child)
                    self._check_module(index, path, children.get(child), original, thorough)
                    waiting.append((path, original))
        self._note(block)

    def _check_module(
        self, index: int, name: str, here: nn.Module | None, original: nn.Module, thorough: bool
    ) -> None:
        if here is None or base_of(here) is not original:
            _refuse(index, name, "was replaced")
        for module in (*_tuners(here), original):
            _check_calls(index, name, module)
        if not thorough:
            return
        for own, tensor in (*original._parameters.items(), *original._buffers.items()):
            if tensor is not None and not is_placeholder(tensor):
                _refuse(index, f"{name}.{own}", "was replaced")
        self._check_values(index, name, original)

    def _check_values(self, index: int, name: str, module: nn.Module) -> None:
        kind = _layer_class(module)
        if kind is not self._classes[name] and name:
            _refuse(index, f"the class of {name}", "was changed")
        if _has_foreign_forward(kind):
            _refuse(index, f"{kind.__name__}.forward", "was replaced")
        called = self._called.get(kind, {})
        if called and (other := _exchanged(called, _called_by(kind))) is not None:
            _refuse(index, f"{kind.__module__}.{other}", "was replaced")
        if (changed := _changed(module, kind, self._values[name])) is not None:
            _refuse(index, _join(name, changed), "was changed")

    def _note(self, block: nn.Module) -> None:
        """Remember a structure that was found to be right, for a quick look at the next step."""
        modules = list(block.modules())
        self._counts = [(module._modules, len(module._modules)) for module in modules]
        self._links = [
            (module._modules, name, child, child.__dict__.get("forward"))
            for module in modules
            for name, child in module._modules.items()
            if child is not None
        ]

    def _as_it_was(self) -> bool:
        return all(
            table.get(name) is child
            and child.__dict__.get("forward") is forward
            and not child._forward_pre_hooks
            for table, name, child, forward in self._links
        ) and all(len(table) == count for table, count in self._counts)


def _tuners(module: nn.Module) -> list[nn.Module]:
    found = []
    while is_tuner(module):
        found.append(module)
        module = module.base_layer  # type: ignore[assignment]
    return found


def has_other_forward(module: nn.Module) -> bool:
    """Whether somebody has put a ``forward`` of their own on a module."""
    forward = module.__dict__.get("forward")
    return forward is not None and not type(forward).__module__.startswith(_LISTENERS)


def _check_calls(index: int, name: str, module: nn.Module) -> None:
    if has_other_forward(module):
        _refuse(index, f"{name}.forward", "was replaced")
    # What PEFT tells its own layers for a call travels, or is refused: see `tuner_layers`.
    if module._forward_pre_hooks and not is_tuner(module):
        _refuse(index, name, "has a forward pre-hook")


def _refuse(index: int, name: str, what: str) -> NoReturn:
    raise Unsupported(
        f"block {index}: {name} {what}, but the block runs on servers, where it would have no "
        f"effect; put it back, hook the block itself, or bring it home: swarm.own({index})"
    )


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _values(module: nn.Module) -> dict[str, Any]:
    """Numbers, words and functions that a module computes with."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if isinstance(value, _PLAIN) and name[0] != "_" and name not in _OWN_WORDS
    }


# What torch, PEFT and this package keep on modules; a forward is looked at by itself.
_OWN_WORDS = frozenset({"training", "forward", "gradient_checkpointing", "call_super_init"})


def _changed(module: nn.Module, kind: type[nn.Module], planned: Mapping[str, Any]) -> str | None:
    """What a module computes with, and no longer is as planned.

    A name that somebody notes on a module is nothing that its forward knows of.
    """
    missing = object()
    here = _values(module)
    for name in sorted(planned.keys() | here.keys()):
        if here.get(name, missing) == planned.get(name, missing):
            continue
        if name in planned or hasattr(kind, name) or _mentions(kind, name):
            return name
    return None


def _mentions(kind: type[nn.Module], name: str) -> bool:
    code = inspect.unwrap(kind.forward).__code__
    return name in code.co_names or name in code.co_consts


def _layer_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has in an ordinary model."""
    return getattr(module, "layer_class", type(module))


def _has_foreign_forward(kind: type[nn.Module]) -> bool:
    """Whether somebody has put a ``forward`` from elsewhere on a class."""
    owner = next(one for one in kind.__mro__ if "forward" in vars(one))
    return getattr(vars(owner)["forward"], "__module__", None) != owner.__module__


def _called_by(kind: type[nn.Module]) -> dict[str, Any]:
    """The functions of its file that a class's ``forward`` may call, by name."""
    forward = inspect.unwrap(kind.forward)
    known: Any = getattr(forward, "__globals__", {})
    return {
        name: known[name]
        for name in getattr(getattr(forward, "__code__", None), "co_names", ())
        if isinstance(known.get(name), types.FunctionType)
    }


def _exchanged(planned: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    return next((name for name in sorted(planned) if here.get(name) is not planned[name]), None)


def refuse_other_attention(block: int, name: str | None) -> None:
    """Refuse a function of attention that is not transformers' own.

    Args:
        name: of the implementation, as the config has it.

    Raises:
        Unsupported: the function under this name is somebody else's.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function: Any = ALL_ATTENTION_FUNCTIONS.get(name)
    while isinstance(function, functools.partial):
        function = function.func
    if function is not None and not function.__module__.startswith("transformers."):
        raise Unsupported(
            f"attention {name!r} is a function of your own ({function.__module__}), but block "
            f"{block} runs on servers with transformers' own; set another implementation, or bring "
            "the blocks home: swarm.own(slice(None))"
        )
