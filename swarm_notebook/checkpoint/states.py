"""Where hidden states are among what a decoder gives a block, and in what the block returns.

Decoders pass them first, or by name. A block returns them, or in some architectures a tuple that
begins with them. These are the only places that know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_NAME = "hidden_states"


def input_state(args: tuple[Any, ...], named: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states in what a block is called with."""
    state: torch.Tensor = args[0] if args else named[_NAME]
    return state


def with_input_state(
    args: tuple[Any, ...], named: dict[str, Any], state: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is called with, with other hidden states."""
    return ((state, *args[1:]), named) if args else (args, {**named, _NAME: state})


def output_state(output: Any) -> torch.Tensor:
    """The hidden states in what a block returned."""
    return output if isinstance(output, torch.Tensor) else output[0]


def with_output_state(output: Any, state: torch.Tensor) -> Any:
    """What a block returned, with other hidden states."""
    return state if isinstance(output, torch.Tensor) else (state, *output[1:])
