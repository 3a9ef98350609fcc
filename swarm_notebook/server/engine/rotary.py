"""Rotary embeddings that depend on the length of a sequence (``dynamic``, ``longrope``).

transformers' modules choose their frequencies by the largest position of a call, and ``dynamic``
ones remember the longest call that they ever had. On a server a call may be one piece of a long
prompt, and the one before was somebody else's. So what a call goes by comes with the request: the
length that the notebook's own rotary modules have come to. What a call has left behind is undone
before the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_STRETCHING = ("dynamic", "longrope")


def stretching_kinds(module: nn.Module) -> list[str]:
    """Those of a module's rotary embeddings that are such, as transformers names their kinds."""
    found = getattr(module, "rope_type", None)
    # One name, or a dict with one for each kind of block.
    kinds = found.values() if isinstance(found, dict) else [found]
    return [str(kind) for kind in kinds if any(word in str(kind) for word in _STRETCHING)]


def stretching_modules(decoder: nn.Module) -> list[nn.Module]:
    """The rotary modules of a decoder that depend on the length of a sequence."""
    return [module for module in decoder.modules() if stretching_kinds(module)]


@contextmanager
def turning_by(modules: Sequence[nn.Module], length: int | None) -> Iterator[None]:
    """Within it the modules go by sequences of ``length`` positions; None: by those they get."""
    with ExitStack() as hooks:
        for module in modules:
            lengthen = _lengthen(length)
            hooks.enter_context(module.register_forward_pre_hook(lengthen, with_kwargs=True))
            if length is not None:
                hooks.enter_context(module.register_forward_hook(_shorten))
        yield


def _lengthen(length: int | None) -> Callable[..., tuple[tuple, dict]]:
    """A hook that adds the last position of a sequence of this length to those that are asked."""

    def hook(
        module: Any, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids: torch.Tensor = inputs[1] if len(inputs) > 1 else named["position_ids"]

        def asked(positions: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if len(inputs) > 1:
                return (inputs[0], positions, *inputs[2:]), named
            return inputs, {**named, "position_ids": positions}

        last = ids[..., :1]
        # A call at position 0 takes transformers' modules back to their original length.
        first_inputs, first_named = asked(torch.zeros_like(last))
        module.forward(*first_inputs, **first_named)
        if length is None:
            return inputs, named
        return asked(torch.cat([ids, torch.full_like(last, length - 1)], dim=-1))

    return hook


def _shorten(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
    """Take the added position away again: ``[rows, positions + 1, head size]``, once or twice."""
    if isinstance(output, torch.Tensor):
        return output[:, :-1]
    return tuple(tensor[:, :-1] for tensor in output)
