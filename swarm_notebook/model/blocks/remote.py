"""What becomes of a decoder layer: the same object, whose `forward` asks the swarm.

A layer keeps its class (a dynamic subclass of it), its name and its parameters' shapes, so that
``isinstance``, ``repr``, hooks, PEFT's injection and transformers' recording of hidden states
work as ever. Its parameters are placeholders: they have a shape and a dtype and take no memory.

A block that came home (see `home`) has its real weights and its own forward; only the call goes
through the runner, which has to know what comes in and what goes out.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from swarm_notebook.model.blocks.hooks import allow_writes, refuse_writes
from swarm_notebook.model.blocks.intact import refuse_export, refuse_transforms
from swarm_notebook.model.blocks.state import hold_what_is_here


class BlockRunner(Protocol):
    """What a block asks for its output (`runner.Runner`)."""

    returns_tuple: bool

    def given(self, named: dict[str, Any]) -> None: ...

    def run(self, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor: ...

    def run_own(
        self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict
    ) -> Any: ...


class SwarmBlock(nn.Module):
    """A decoder layer of a remote model, wherever it runs.

    Attributes:
        layer_class: the class that the layer has in an ordinary model.
    """

    layer_class: type[nn.Module]
    _runner: BlockRunner
    _index: int

    def attach(self, runner: BlockRunner, index: int) -> None:
        """Make this the block ``index`` of the model that `runner` runs."""
        self._runner, self._index = runner, index
        hold_what_is_here(self)
        for module in self.modules():
            # As on what transformers has loaded, which is not to begin anew.
            module._is_hf_initialized = True  # type: ignore[assignment]
        refuse_writes(index, self)

    def __copy__(self) -> SwarmBlock:
        return self._twin(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> SwarmBlock:
        memo[id(self)] = twin = self._twin({})
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _twin(self, state: dict[str, Any]) -> SwarmBlock:
        twin = object.__new__(type(self))
        twin.__dict__.update(state)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Before pickle finds, and says, only that it cannot import this class.
        return self._runner.__reduce__()

    def _get_name(self) -> str:
        """What ``repr`` calls it: where it runs is seen there."""
        return type(self).__qualname__


class RemoteBlock(SwarmBlock):
    """Mixed into a decoder layer's class, in front of it: the block runs on servers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own call."""
        if self._forward_pre_hooks:
            self._runner.given(self._named(args[1:], kwargs))
        return super().__call__(*args, **kwargs)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's output for ``hidden_states`` ``[batch, length, hidden]``."""
        refuse_export(self._index)
        refuse_transforms(self._index)
        output = self._runner.run(self._index, hidden_states, self._named(args, kwargs))
        return (output,) if self._runner.returns_tuple else output

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All that it is called with behind the hidden states, by name."""
        if not args:
            return kwargs
        return {**dict(zip(_argument_names(self.layer_class), args, strict=False)), **kwargs}

    @property
    def gradient_checkpointing(self) -> bool:
        """Never: nothing that a checkpoint would save is kept here. Heeded when it comes home."""
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.__dict__["gradient_checkpointing"] = value


class OwnBlock(SwarmBlock):
    """Mixed into a decoder layer's class, in front of it: the block runs here, with its weights."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own call; hooks, checkpointing and a replaced ``forward`` are inside."""
        return self._runner.run_own(self._index, super().__call__, args, kwargs)


def _argument_names(layer_class: type[nn.Module]) -> list[str]:
    """What a layer's forward takes behind the hidden states."""
    return list(inspect.signature(layer_class.forward).parameters)[2:]


@functools.cache
def swarm_class(layer_class: type[nn.Module], *, own: bool) -> Any:
    """The subclass of a decoder layer's class that runs on servers, or here."""
    word, mixin = ("Own", OwnBlock) if own else ("Remote", RemoteBlock)
    return type(
        # The name stays: accelerate (which modules are not split) and others go by it.
        layer_class.__name__,
        (mixin, layer_class),
        {
            "__module__": layer_class.__module__,
            "__qualname__": f"{word}{layer_class.__qualname__}",
            "__doc__": layer_class.__doc__,
            "layer_class": layer_class,
        },
    )


def become(block: SwarmBlock, *, own: bool) -> None:
    """Let a block run here, or on servers, from its next call on."""
    kind: Any = block.layer_class
    block.__class__ = swarm_class(kind, own=own)
    if own:
        allow_writes(block)
    else:
        refuse_writes(block._index, block)
