"""State dicts of modules with remote blocks in them: what is here, and a word about the rest.

Whoever asks for a state dict (of the model, of a PEFT model or another module around it, or of a
block) gets the tensors that are here and is told once which blocks' weights are left out. Loading
one asks for nothing more, and refuses weights that are on the servers.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn

from swarm_notebook.client.servers.routing import describe_blocks
from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.placeholders import is_placeholder

# They take the weights that they know by name, all of which are here: PEFT those of its adapters.
_KNOW_WHAT_THEY_TAKE = ("peft", "swarm_notebook")


def hold_what_is_here(block: nn.Module) -> None:
    """Let state dicts with this block in them have what is here, and say what they have not."""
    block.register_state_dict_post_hook(_without_placeholders)
    block.register_load_state_dict_pre_hook(_refuse_placeholders)
    block.register_load_state_dict_post_hook(_miss_no_placeholders)


def _without_placeholders(
    block: nn.Module, state: dict[str, Any], prefix: str, _metadata: object
) -> None:
    """A state dict holds what is here; what the servers hold is not."""
    names = [name for name in state if name.startswith(prefix)]
    absent = [
        name
        for name in names
        if isinstance(state[name], torch.Tensor) and is_placeholder(state[name])
    ]
    for name in absent:
        del state[name]
    if absent:
        _warn(block, block)


def _warn(block: Any, root: nn.Module) -> None:
    """Say what is left out, to who asked for the state dict of the outermost module."""
    # Two calls away from torch's, which calls itself for each module inside of the one asked for.
    frame, level = sys._getframe(2), 3
    while frame.f_code is nn.Module.state_dict.__code__ and frame.f_back is not None:
        root, frame, level = frame.f_locals["self"], frame.f_back, level + 1
    asking = str(frame.f_globals.get("__name__"))
    inside, runner = set(root.modules()), block._runner
    remote = [
        index
        for index, one in enumerate(runner.blocks)
        if one in inside and index not in runner.home
    ]
    if asking.partition(".")[0] in _KNOW_WHAT_THEY_TAKE or remote[:1] != [block._index]:
        return
    warnings.warn(
        f"state_dict: the weights of {describe_blocks(remote)} are on servers and left out; for "
        "all weights use the checkpoint itself, or bring the blocks home: "
        f"swarm.own({remote[0] if len(remote) == 1 else 'slice(None)'})",
        stacklevel=level,
    )


def _refuse_placeholders(
    block: Any,
    state: dict[str, Any],
    prefix: str,
    _metadata: object,
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    _errors: list[str],
) -> None:
    """Weights that are on the servers are not loaded."""
    block._loading = {prefix + name for name, one in _named(block) if is_placeholder(one)}
    if found := sorted(block._loading & state.keys()):
        index = block._index
        raise Unsupported(
            f"load_state_dict: {found[0]} is on the servers and cannot be changed there; leave the "
            f"weights of block {index} out, or bring the block home first: swarm.own({index})"
        )


def _miss_no_placeholders(block: Any, incompatible: Any) -> None:
    """A state dict is not asked for what is not here."""
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if name not in block._loading]


def _named(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
