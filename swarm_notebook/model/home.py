"""Blocks come home: their real weights are loaded here, and they run in the notebook.

The layer object stays the same, with its hooks, its adapters and whatever else was done to it; its
placeholders get the weights of the same checkpoint, through the same reader that a server uses.
Then everything that torch can do to a module holds inside of it. The chain of servers ends before
it and begins again behind it, so every stretch of blocks at home costs one more trip.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from swarm_notebook.checkpoint.files.source import ModelSource
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.client.servers.routing import block_runs, describe_blocks
from swarm_notebook.errors import BlocksOutOfRange, Unsupported
from swarm_notebook.model.blocks.base_modules import base_of
from swarm_notebook.model.blocks.placeholders import (
    Origin,
    is_placeholder,
    make_real,
    make_remote,
    remote_buffer,
)
from swarm_notebook.model.blocks.remote import become
from swarm_notebook.progress import Waiting


class _Read:
    """How much of the weights was read."""

    def __init__(self) -> None:
        self._done, self._total = 0, 1

    def __call__(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    def percent(self) -> int:
        return 100 * self._done // max(self._total, 1)


Blocks = int | slice | Iterable[int | slice]


def which(blocks: Blocks, num_blocks: int) -> list[int]:
    """The blocks that ``blocks`` names, in order, each once; negative ones count from the end.

    Slices may also stand in a list.

    Raises:
        BlocksOutOfRange: the model has no such block.
        TypeError: it is no block, slice, range or list of blocks.
    """
    named: list[Any] = []
    several = isinstance(blocks, Iterable) and not isinstance(blocks, slice)
    parts: Any = blocks if several else [blocks]
    for part in parts:
        inside = list(range(num_blocks)[part]) if isinstance(part, slice) else [part]
        if not inside:
            raise BlocksOutOfRange(
                f"blocks: {part!r} names no block; the model has {num_blocks} blocks, 0 to "
                f"{num_blocks - 1}"
            )
        named += inside
    if any(type(block) is not int for block in named):
        raise TypeError(
            f"blocks: {blocks!r}; give a block (3), a list ([0, -1]), a slice or a range"
        )
    wrong = [block for block in named if not -num_blocks <= block < num_blocks]
    if wrong:
        raise BlocksOutOfRange(
            f"blocks: {wrong[0]}; the model has {num_blocks} blocks, 0 to {num_blocks - 1}"
        )
    return sorted({block % num_blocks for block in named})


def bring_home(model: Any, source: ModelSource, blocks: Sequence[int]) -> None:
    """Load the weights of remote ``blocks`` and let them run here; those at home stay as they are.

    Raises:
        ModelNotFound: the checkpoint lacks their weights.
        Unsupported: they are kept in a form that the notebook's layers do not have.
    """
    runner = model._runner
    missing = [block for block in blocks if block not in runner.home]
    device = model.get_input_embeddings().weight.device
    for start, end in block_runs(missing):
        run, read = range(start, end), _Read()
        what = f"Loading {describe_blocks(run)} of {source.name}"
        with Waiting(what, total=100, unit="%", count=read.percent):
            loaded = load_blocks(
                source, start, end, dtype=model.dtype, device=device, progress=read
            )
        plans = [
            _fillings(runner.blocks[block], real, block)
            for block, real in zip(run, loaded.layers, strict=True)
        ]
        for filling in plans:
            for owner, name, tensor in filling:
                _put(owner, name, tensor)
        for block in run:
            become(runner.blocks[block], own=True)
    model._runner.home_changed()


def send_away(model: Any, blocks: Iterable[int]) -> None:
    """Let blocks at home run on servers again; what was changed in their weights is lost."""
    runner = model._runner
    for index in set(blocks) & runner.home:
        block = runner.blocks[index]
        empty(model, block, index)
        become(block, own=False)
    model._runner.home_changed()


def weight_bytes(block: nn.Module) -> int:
    """The memory that a block's own weights take at home."""
    return sum(tensor.numel() * tensor.itemsize for *_, tensor in _tensors(block))


def empty(model: Any, block: nn.Module, index: int) -> None:
    """Let the tensors of a block be read from the checkpoint when they are asked for."""
    for owner, name, path, tensor in _tensors(block):
        origin = Origin(index, path, model._tensors.read, weakref.ref(block))
        if name in owner._buffers:
            owner._buffers[name] = remote_buffer(tensor, origin)
        else:
            make_remote(tensor, origin)


def _tensors(block: nn.Module) -> list[tuple[nn.Module, str, str, Any]]:
    """The model's own tensors in a block, without those of adapters.

    Each with the module that owns it, its name there, and its name in the block.
    """
    found: list[tuple[nn.Module, str, str, Any]] = []
    waiting = [("", block)]
    while waiting:
        prefix, module = waiting.pop()
        module = base_of(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.append((module, name, prefix + name, tensor))
        for name, child in module._modules.items():
            if child is not None:
                waiting.append((f"{prefix}{name}.", child))
    return found


def _fillings(
    block: nn.Module, real: nn.Module, index: int
) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """What goes where: the real tensors for the placeholders of a block.

    A module that the user has put in the place of one of the model's keeps what it has.
    """
    fillings, filled = [], set()
    for name, tensor in [*real.named_parameters(), *real.named_buffers()]:
        *path, leaf = name.split(".")
        owner: nn.Module | None = block
        for part in path:
            child = None if owner is None else owner._modules.get(part)
            owner = None if child is None else base_of(child)
        if owner is None:
            continue
        here = owner._parameters.get(leaf, owner._buffers.get(leaf))
        if here is None or not is_placeholder(here):
            continue
        if here.shape != tensor.shape:
            raise Unsupported(
                f"block {index}: {name} has shape {list(tensor.shape)} in the checkpoint and "
                f"{list(here.shape)} in the model: quantised weights cannot come home"
            )
        fillings.append((owner, leaf, tensor.detach()))
        filled.add((id(owner), leaf))
    for owner, name, _, tensor in _tensors(block):
        if is_placeholder(tensor) and (id(owner), name) not in filled:
            raise Unsupported(
                f"block {index}: the checkpoint has no {name} of {type(owner).__name__}: "
                "quantised weights cannot come home"
            )
    return fillings


def _put(owner: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in owner._buffers:
        owner._buffers[name] = tensor
    else:
        parameter: Any = owner._parameters[name]
        make_real(parameter, tensor)  # the object stays, for optimizers and ties
