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


def deliver(name: str, module: nn.Module, output: torch.Tensor) -> None:
    """Call a module's forward hooks with the output that its server captured.

    Raises:
        Unsupported: a hook wants to change it.
    """
    version = output._version
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", "") == _RECORDING_HOOKS:
            continue
        if key in module._forward_hooks_with_kwargs:
            changed: Any = hook(module, (), {}, output)
        else:
            changed = hook(module, (), output)
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
