"""Which blocks, and which modules inside of blocks, somebody looks at through hooks.

Only what is observed travels. Hooks on modules inside a block can read outputs, which the server
captures; they cannot write, because the block runs elsewhere as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from swarm_notebook.errors import Unsupported

# Once asked for hidden states, transformers leaves its recording hooks on every layer for good;
# they are idle in calls that do not ask.
_RECORDING_HOOKS = "transformers.utils.output_capturing"

_NO_WRITES = (
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


# An attention implementation without a mask function: transformers then makes no masks here,
# where nobody would look at them.
NO_ATTENTION = "swarm"


def observed_boundaries(blocks: Sequence[nn.Module], everywhere: bool) -> set[int]:
    """Blocks whose outputs somebody will look at: those around observed blocks."""
    everywhere = everywhere or torch_module._has_any_global_hook()
    wanted: set[int] = set()
    for index, block in enumerate(blocks):
        if everywhere or _is_observed(block):
            wanted.update((index - 1, index))
    wanted.discard(-1)
    return wanted


def _is_observed(block: nn.Module) -> bool:
    if block._forward_pre_hooks or block._backward_hooks or block._backward_pre_hooks:
        return True
    return "forward" in block.__dict__ or _is_read(block)


def _is_read(module: nn.Module) -> bool:
    return any(
        getattr(hook, "__module__", "") != _RECORDING_HOOKS
        for hook in module._forward_hooks.values()
    )


def modules_inside(blocks: Mapping[int, nn.Module]) -> list[tuple[int, str, nn.Module]]:
    """All modules inside of blocks, with their block and dotted name."""
    return [
        (index, name, module)
        for index, block in blocks.items()
        for name, module in block.named_modules()
        if name
    ]


def observed_inside(
    modules: Sequence[tuple[int, str, nn.Module]],
) -> dict[int, list[tuple[str, nn.Module]]]:
    """Those of `modules_inside` with forward hooks, by block."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for index, name, module in modules:
        if module._forward_hooks and _is_read(module):
            found.setdefault(index, []).append((name, module))
    return found


class TupleKinds:
    """Modules that return more than a tensor, as far as transformers says so itself.

    A decoder's ``_can_record_outputs`` names the classes whose output has attention weights behind
    the attention's own output, and those of routers. Servers send the first tensor.
    """

    def __init__(self, decoder: nn.Module):
        recorded: Any = getattr(decoder, "_can_record_outputs", None) or {}
        self._config: Any = getattr(decoder, "config", None)
        self._local = getattr(self._config, "_attn_implementation", None)
        self._attentions = _classes(recorded.get("attentions"))
        self._routers = _classes(recorded.get("router_logits"))

    def shaped(self, name: str, module: nn.Module, output: torch.Tensor) -> Any:
        """What the module returns on a local model.

        Raises:
            Unsupported: there is more in it than was sent.
        """
        if isinstance(module, self._attentions):
            chosen = self._config._attn_implementation
            if (self._local if chosen == NO_ATTENTION else chosen) == "eager":
                raise Unsupported(f"{name} returns attention weights, too; {_NOT_SENT}")
            return (output, None)
        if isinstance(module, self._routers):
            raise Unsupported(f"{name} returns several tensors; {_NOT_SENT}")
        return output


def _classes(entries: Any) -> tuple[type, ...]:
    listed = entries if isinstance(entries, (list, tuple)) else [entries]
    kinds = [getattr(entry, "target_class", entry) for entry in listed]
    return tuple(kind for kind in kinds if isinstance(kind, type))


_NOT_SENT = (
    "of modules inside a remote block servers send the first tensor of the output; bring the block "
    "home: swarm.own(block)"
)


def _refuse_reading(*_: Any) -> NoReturn:
    raise Unsupported(
        f"a hook inside a remote block reads the module's inputs; {_NOT_SENT}, or hook the module "
        "before it"
    )


class _NoArguments(tuple):
    """The arguments of a module whose inputs were not sent: nobody reads them as if empty."""

    __slots__ = ()
    __getitem__ = __iter__ = __len__ = __contains__ = __eq__ = _refuse_reading
    __hash__ = tuple.__hash__


class _NoNamedArguments(dict):
    __getitem__ = __iter__ = __len__ = __contains__ = __eq__ = _refuse_reading
    get = keys = values = items = _refuse_reading


def deliver(name: str, module: nn.Module, output: torch.Tensor, kinds: TupleKinds) -> None:
    """Call a module's forward hooks with the output that its server captured.

    Raises:
        Unsupported: a hook wants to change it, or to read what was not sent.
    """
    version, shaped = output._version, kinds.shaped(name, module, output)
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", "") == _RECORDING_HOOKS:
            continue
        if key in module._forward_hooks_with_kwargs:
            changed: Any = hook(module, _NoArguments(), _NoNamedArguments(), shaped)
        else:
            changed = hook(module, _NoArguments(), shaped)
        if changed is not None or output._version != version:
            raise Unsupported(f"a forward hook on {name} changes its output; {_INSTEAD}")


_INSTEAD = (
    "modules inside a remote block can be read, not written: hook the block itself to change its "
    "input or output, train inside it with a PEFT adapter, or bring it home: swarm.own(block)"
)


def allow_writes(block: nn.Module) -> None:
    """Undo `refuse_writes`."""
    for module in block.modules():
        for method in _NO_WRITES:
            module.__dict__.pop(method, None)


def refuse_writes(index: int, block: nn.Module) -> None:
    """Make the hooks that cannot work inside a remote block raise when they are registered."""
    for name, module in block.named_modules():
        if name:
            for method in _NO_WRITES:
                setattr(module, method, functools.partial(_refuse, f"block {index}.{name}", method))


def _refuse(name: str, method: str, *_: Any, **__: Any) -> NoReturn:
    raise Unsupported(f"{method} on {name}: {_INSTEAD}")
