"""What becomes of a decoder layer: the same object, whose `forward` asks the swarm.

A layer keeps its class (a dynamic subclass of it), its name and its parameters' shapes, so that
``isinstance``, ``repr``, hooks, PEFT's injection and transformers' recording of hidden states
work as ever. Its parameters are placeholders, zero-stride views of one zero: they have a shape
and a dtype and take no memory; `_apply` keeps them so under ``.to(…)`` and ``.half()``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm_notebook.model.hooks import refuse_writes
from swarm_notebook.model.placeholders import is_placeholder

if TYPE_CHECKING:
    from swarm_notebook.model.runner import Runner


class RemoteBlock(nn.Module):
    """Mixed into a decoder layer's class, in front of it."""

    _runner: Runner
    _index: int

    def attach(self, runner: Runner, index: int) -> None:
        """Make this the block ``index`` of the model that `runner` runs."""
        self._runner, self._index = runner, index
        refuse_writes(index, self)
        self.register_state_dict_post_hook(_without_placeholders)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's output for ``hidden_states`` ``[batch, length, hidden]``."""
        output = self._runner.run(self._index, hidden_states, kwargs)
        return (output,) if self._runner.returns_tuple else output

    def __deepcopy__(self, memo: dict) -> RemoteBlock:
        for parameter in filter(is_placeholder, self.parameters()):
            # A clone, which torch would make, takes the memory that a placeholder saves.
            memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
        memo[id(self)] = twin = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not is_placeholder(tensor):
                return fn(tensor)
            return fn(tensor.as_strided((), ())).expand(tensor.shape)

        return super()._apply(keep, recurse)


def _without_placeholders(
    _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object
) -> None:
    """A state dict holds what is here; what the servers hold is not."""
    for name in [name for name in state if name.startswith(prefix)]:
        if isinstance(state[name], torch.Tensor) and is_placeholder(state[name]):
            del state[name]


@functools.cache
def remote_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The remote subclass of a decoder layer's class."""
    return type(
        f"Remote{layer_class.__name__}",
        (RemoteBlock, layer_class),
        {"__module__": layer_class.__module__, "__doc__": layer_class.__doc__},
    )
