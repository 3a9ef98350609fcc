"""Which blocks, and which modules inside of blocks, somebody looks at through hooks.

Only what is observed travels. Hooks on modules inside a block can read outputs, which the server
captures; they cannot write, because the block runs elsewhere as a whole.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NoReturn

import torch
import torch.overrides
import torch.utils._python_dispatch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.base_modules import own_modules
from swarm_notebook.model.blocks.intact import refuse_other_attention
from swarm_notebook.model.blocks.same import SameTensor

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
_NO_ATTENTION = "swarm"


# What transformers' masks go by in a config (its `masking_utils`).
_OF_MASKS = ("is_causal", "sliding_window", "attention_chunk_size", "layer_types")


class Masks:
    """Lets a decoder make no masks while all its blocks are remote.

    In between its config reads as transformers knows it.
    """

    def __init__(self, decoder: Any):
        self._config: Any = decoder.config
        self.attention: str = self._config._attn_implementation
        self._rules = copy.deepcopy(self._of_masks())

    def _of_masks(self) -> dict[str, Any]:
        return {name: getattr(self._config, name, None) for name in _OF_MASKS}

    def check(self, block: int) -> None:
        """Refuse what a remote block would have to be told of attention, before its first call.

        Raises:
            Unsupported: the config says something else than it did, or names somebody's own
                function.
        """
        refuse_other_attention(block, self._config._attn_implementation)
        rules = self._of_masks()
        for name, before in self._rules.items():
            if rules[name] != before:
                raise Unsupported(
                    f"config.{name} is {rules[name]!r} and was {before!r}: the masks of remote "
                    f"blocks are made by their servers; put it back, or bring block {block} and "
                    "all others home: swarm.own(slice(None))"
                )

    def leave_out(self) -> None:
        """From now on, until `restore`."""
        if self._config._attn_implementation != _NO_ATTENTION:
            self.attention = self._config._attn_implementation
            self._config._attn_implementation = _NO_ATTENTION

    def restore(self) -> None:
        """Let the config say what it did."""
        if self._config._attn_implementation == _NO_ATTENTION:
            self._config._attn_implementation = self.attention


def hooks_everywhere() -> bool:
    """Whether there are hooks that torch calls for every module."""
    return torch_module._has_any_global_hook()


def mode_of_others() -> str | None:
    """The name of a mode that looks into torch's operations; not of torch's inner ones, or ours."""
    modes = (
        *torch.overrides._get_current_function_mode_stack(),
        *torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    )
    named = (type(mode) for mode in modes)
    return next((one.__name__ for one in named if not one.__module__.startswith(_INNER)), None)


# Default devices, fake tensors, functional tensors and the like.
_INNER = ("torch.utils._", "torch._", "torch.fx.", "swarm_notebook.")


def observed_boundaries(blocks: Sequence[nn.Module], everywhere: bool) -> set[int]:
    """Blocks whose outputs somebody will look at: those around observed blocks."""
    everywhere = everywhere or hooks_everywhere()
    wanted: set[int] = set()
    for index, block in enumerate(blocks):
        if everywhere or is_observed(block):
            wanted.update((index - 1, index))
    wanted.discard(-1)
    return wanted


def is_observed(block: nn.Module) -> bool:
    """Whether somebody sees, or decides, what goes into a block or comes out of it."""
    if block._forward_pre_hooks or block._backward_hooks or block._backward_pre_hooks:
        return True
    # A class of the user's own around the block is called like a forward of their own.
    return "forward" in block.__dict__ or "layer_class" not in vars(type(block)) or _is_read(block)


def _is_read(module: nn.Module) -> bool:
    return any(
        getattr(hook, "__module__", "") != _RECORDING_HOOKS
        for hook in module._forward_hooks.values()
    )


def seen_by_others(module: nn.Module) -> bool:
    """Whether somebody but us may see what goes into a module outside of the blocks, or out."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    names = (getattr(hook, "__module__", None) or "" for hook in hooks)
    return any(
        name != _RECORDING_HOOKS and not name.startswith("swarm_notebook.model.") for name in names
    )


def seen_outside(decoder: nn.Module, blocks: str) -> bool:
    """Whether somebody but us has hooks on a decoder or in it, outside of its list of blocks."""
    others = (one for name, one in decoder._modules.items() if name != blocks and one is not None)
    inside = chain.from_iterable(one.modules() for one in others)
    return any(seen_by_others(module) for module in chain((decoder,), inside))


# Hooks of these packages read, or are known.
_KNOWN_HOOKS = ("swarm_notebook.", "transformers.", "peft.", "nnsight.", "accelerate.")


def foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks of the user's own."""
    return any(
        not (getattr(hook, "__module__", None) or "").startswith(_KNOWN_HOOKS)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


class ChangeWatch:
    """Tells, as fast as Python can, whether anything about modules has changed since it was made.

    Sees modules that were added, removed or exchanged, hooks, and a ``forward`` that was planted.
    """

    def __init__(self, roots: Sequence[nn.Module]):
        # Attribute tables, which stay what they are as long as their modules.
        self._tables = [module.__dict__ for root in roots for module in root.modules()]
        self._planted = any("forward" in table for table in self._tables)
        self._sizes = list(map(len, self._tables))
        self._held = list(map(_HELD, self._tables))
        self._families = [held[0] for held in self._held if held[0]]
        self._children = list(self._all_children())
        # Nearly all modules have no hooks: that they still have none is asked in one go.
        every = [hooks for held in self._held for hooks in held[1:]]
        self._bare = [hooks for hooks in every if not hooks]
        self._hooked = [(hooks, len(hooks)) for hooks in every if hooks]

    @property
    def unchanged(self) -> bool:
        # Hardly a loop of Python's own: this is done for every token. Lists compare what is in them
        # by identity first, which ends the comparison wherever nothing has changed.
        return (
            not self._planted
            and list(map(len, self._tables)) == self._sizes
            and list(map(_HELD, self._tables)) == self._held
            and not any(self._bare)
            and all(len(hooks) == count for hooks, count in self._hooked)
            and list(self._all_children()) == self._children
        )

    def _all_children(self) -> Iterator[nn.Module | None]:
        return chain.from_iterable(map(dict.values, self._families))


_HELD = itemgetter(
    "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
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
    modules: Sequence[tuple[int, str, nn.Module]], recorded: Container[tuple[int, str]]
) -> dict[int, list[tuple[str, nn.Module]]]:
    """Those of `modules_inside` with forward hooks, or ``recorded``, by block."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for index, name, module in modules:
        if (module._forward_hooks and _is_read(module)) or (index, name) in recorded:
            found.setdefault(index, []).append((name, module))
    return found


class RecordedOutputs:
    """What transformers itself records of modules inside of blocks.

    A decoder's ``_can_record_outputs`` names classes of modules and, for each, which part of their
    output is recorded: attention weights, a router's logits. Servers send the first tensor.
    """

    def __init__(self, decoder: nn.Module, masks: Masks):
        self._config: Any = decoder.config
        self._masks = masks
        entries: Any = getattr(decoder, "_can_record_outputs", None) or {}
        self._specs: dict[str, list[Any]] = {
            key: list(specs) if isinstance(specs, (list, tuple)) else [specs]
            for key, specs in entries.items()
            if key != "hidden_states"
        }
        self._attentions = self._classes("attentions")
        self._others = tuple(
            kind for key in self._specs if key != "attentions" for kind in self._classes(key)
        )

    def _classes(self, key: str) -> tuple[type, ...]:
        found = (getattr(spec, "target_class", spec) for spec in self._specs.get(key, ()))
        return tuple(kind for kind in found if isinstance(kind, type))

    def asked(
        self, kwargs: Mapping[str, Any], modules: Sequence[tuple[int, str, nn.Module]]
    ) -> set[tuple[int, str]]:
        """Which of the modules of remote blocks a call of the decoder asks to have recorded.

        Raises:
            Unsupported: of one of them another part than the first is recorded.
        """
        found: set[tuple[int, str]] = set()
        for key, specs in self._specs.items():
            option = f"output_{key}"
            if key == "attentions" or not kwargs.get(option, getattr(self._config, option, False)):
                continue
            for spec in specs:
                matching = {(block, name) for block, name, module in modules if _is(spec, module)}
                if matching and getattr(spec, "index", 1) != 0:
                    raise Unsupported(f"{option}: {_NOT_SENT}")
                found |= matching
        return found

    def shaped(self, name: str, module: nn.Module, output: torch.Tensor) -> Any:
        """What the module returns on a local model.

        Raises:
            Unsupported: there is more in it than was sent.
        """
        if isinstance(module, self._attentions):
            if self._masks.attention == "eager":
                raise Unsupported(f"{name} returns attention weights, too; {_NOT_SENT}")
            return (output, None)
        if isinstance(module, self._others):
            raise Unsupported(f"{name} returns several tensors; {_NOT_SENT}")
        return output


def _is(spec: Any, module: nn.Module) -> bool:
    kind = getattr(spec, "target_class", spec)
    return isinstance(kind, type) and isinstance(module, kind)


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


def deliver(
    name: str, module: nn.Module, output: torch.Tensor, recorded: RecordedOutputs, *, record: bool
) -> None:
    """Call a module's forward hooks with the output that its server captured.

    Args:
        record: also those by which transformers records it.

    Raises:
        Unsupported: a hook wants to change it, or to read what was not sent.
    """
    given = SameTensor(output, closely=_is_read(module))
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", "") == _RECORDING_HOOKS:
            if record:
                hook(module, _NoArguments(), (output,))
            continue
        shaped = recorded.shaped(name, module, output)
        if key in module._forward_hooks_with_kwargs:
            changed: Any = hook(module, _NoArguments(), _NoNamedArguments(), shaped)
        else:
            changed = hook(module, _NoArguments(), shaped)
        if changed is not None or not given.unchanged:
            raise Unsupported(f"a forward hook on {name} changes its output; {_INSTEAD}")


# Torch's pruning and normalising of weights, before every call.
_OF_WEIGHTS = "torch.nn.utils."
_INSTEAD = (
    "modules inside a remote block can be read, not written: hook the block itself to change its "
    "input or output, train inside it with a PEFT adapter, or bring it home: swarm.own(block)"
)


def allow_writes(block: nn.Module) -> None:
    for module in block.modules():
        for method in _NO_WRITES:
            module.__dict__.pop(method, None)


def refuse_writes(index: int, block: nn.Module) -> None:
    """Make the hooks that cannot work inside a remote block raise when they are registered."""
    # PEFT hooks layers of its own to tell them something: see `tuner_layers`.
    for name, module in own_modules(block):
        for method in _NO_WRITES:
            named = f"block {index}.{name}"
            setattr(module, method, functools.partial(_refuse, module, named, method))


def _refuse(
    module: nn.Module, name: str, method: str, hook: Any = None, *_: Any, **named: Any
) -> RemovableHandle:
    if type(hook).__module__.startswith(_OF_WEIGHTS):
        # The next use is refused: torch fails when it undoes what else it has done for the hook.
        register: Callable[..., RemovableHandle] = getattr(nn.Module, method)
        return register(module, hook, **named)
    raise Unsupported(f"{method} on {name}: {_INSTEAD}")
