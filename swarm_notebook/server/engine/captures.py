"""Outputs of modules inside of blocks, read by hooks during one call.

A module's output is its tensor, or the first tensor of its tuple, as it is when the module
returns. What cannot be answered with one tensor (the module did not run, or several times) is
refused with a reason, and so is what would take more memory than an answer may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import nn

from swarm_notebook.errors import BadRequest

# Of one call: the outputs of four modules of 30 blocks for 1,024 positions at hidden size 1,024.
MAX_BYTES = 512 << 20


class Captures:
    """Hooks on modules named by block and dotted name; they live as long as the context.

    Args:
        most: how many bytes all outputs may have; None for `MAX_BYTES`.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        start: int,
        wanted: Sequence[tuple[int, str]],
        most: int | None = None,
    ):
        self._wanted = wanted
        self._most = MAX_BYTES if most is None else min(most, MAX_BYTES)
        self._modules = [_find(layers[index - start], index, name) for index, name in wanted]
        self._found: dict[tuple[int, str], torch.Tensor] = {}
        self._size = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for key, module in zip(self._wanted, self._modules, strict=True):
            self._stack.enter_context(module.register_forward_hook(self._hook(key)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def outputs(self) -> list[torch.Tensor]:
        """What the modules returned, in the order in which they were named."""
        for index, name in self._wanted:
            if (index, name) not in self._found:
                raise BadRequest(f"inner: {name} of block {index} did not run in this pass")
        return [self._found[key] for key in self._wanted]

    def _hook(self, key: tuple[int, str]) -> Callable[..., None]:
        index, name = key

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, (tuple, list)) else (output,)
            tensor = next((part for part in parts if isinstance(part, torch.Tensor)), None)
            if tensor is None:
                raise BadRequest(
                    f"inner: {name} of block {index} returns {type(output).__name__}, no tensor"
                )
            if key in self._found:
                raise BadRequest(f"inner: {name} of block {index} runs several times in a pass")
            self._size += tensor.numel() * tensor.itemsize
            if self._size > self._most:
                raise BadRequest(
                    f"inner: outputs of more than {self._most} bytes; name fewer modules or send "
                    "fewer rows at a time"
                )
            # A copy: what comes after the module may write into its output.
            self._found[key] = tensor.detach().clone()

        return hook


def _find(layer: nn.Module, index: int, name: str) -> nn.Module:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        raise BadRequest(f"inner: block {index} has no module {name!r}") from None
