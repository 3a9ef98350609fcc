"""Where a transformers model keeps its decoder blocks, and what surrounds them.

Nothing here knows an architecture by name. The decoder's blocks are the outermost ``ModuleList`` that
has ``config.num_hidden_layers`` members; the *trunk* is the chain of modules from the model down to the
one that owns this list (``OPTModel`` → ``OPTDecoder``; most models own it themselves). What hangs off
the trunk beside the blocks is of three kinds:

- without parameters (rotary embeddings, dropout): computes something from positions, or nothing;
- an embedding: adds to the hidden states (learned positions) or makes them (tokens);
- a norm or a projection: maps hidden states before the first or after the last block.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm_notebook.errors import Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Trunk:
    """The modules from the model down to the decoder, and the decoder's list of blocks."""

    modules: tuple[nn.Module, ...]
    layers_name: str

    @property
    def decoder(self) -> nn.Module:
        return self.modules[-1]

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.decoder, self.layers_name)

    def set_layers(self, layers: nn.ModuleList) -> None:
        setattr(self.decoder, self.layers_name, layers)

    def branches(self) -> list[tuple[nn.Module, str, nn.Module]]:
        """(owner, attribute, module) of everything beside the blocks."""
        on_trunk = {id(module) for module in (*self.modules, self.layers)}
        return [
            (owner, name, child)
            for owner in self.modules
            for name, child in owner.named_children()
            if id(child) not in on_trunk
        ]


def find_trunk(model: PreTrainedModel) -> Trunk:
    """Find the blocks of `model`, which must have all of them."""
    count = model.config.num_hidden_layers
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not paths:
        raise Unsupported(
            f"{type(model).__name__} has no list of {count} decoder blocks, so it cannot be split"
        )
    *parents, layers_name = min(paths, key=lambda path: path.count(".")).split(".")
    modules: list[nn.Module] = [model]
    for name in parents:
        modules.append(getattr(modules[-1], name))
    return Trunk(tuple(modules), layers_name)


def restrict_config(config: PreTrainedConfig, start: int, end: int) -> None:
    """Make `config` describe blocks start..end-1 only: their number, and what it lists per block."""
    total = config.num_hidden_layers
    for name, value in list(config.to_dict().items()):
        listed_per_block = isinstance(value, list) and len(value) == total and "layer" in name
        if listed_per_block:
            setattr(config, name, value[start:end])
    config.num_hidden_layers = end - start


class Nothing(nn.Module):
    """Stands for an embedding: adds exactly nothing, in any shape and dtype."""

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


def silence_branches(trunk: Trunk) -> None:
    """Replace everything with parameters beside the blocks by something that changes nothing."""
    for owner, name, child in trunk.branches():
        if next(child.parameters(), None) is not None:
            setattr(owner, name, _neutral(owner, name, child))
    for owner in trunk.modules:
        if owner._parameters:
            raise Unsupported(
                f"{type(owner).__name__} has weights outside of its blocks "
                f"({', '.join(owner._parameters)}), so its blocks cannot be served alone"
            )


def _neutral(owner: nn.Module, name: str, child: nn.Module) -> nn.Module:
    if isinstance(child, nn.Embedding):
        return Nothing()
    if isinstance(child, nn.Linear) or "norm" in type(child).__name__.lower():
        return nn.Identity()
    raise Unsupported(
        f"{type(owner).__name__}.{name} ({type(child).__name__}) is neither an embedding nor a norm nor "
        "a projection, so the blocks of this architecture cannot be served alone"
    )


class _SeenOutput(Exception):  # noqa: N818 - a signal that stops a forward pass, not an error
    """Carries the first block's output out of a forward pass."""


def layer_returns_tuple(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether a block returns a tuple (BLOOM, Falcon) or a tensor: run the first one on meta tensors."""
    config = copy.deepcopy(config)
    restrict_config(config, 0, 1)
    # The implementations whose shapes do not depend on values, which meta tensors do not have.
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    with torch.device("meta"):
        model = model_class(config)
        width = model.get_input_embeddings().weight.shape[1]
        embedded = torch.zeros(1, 1, width, dtype=model.dtype)
    seen: list[Any] = []

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output)
        raise _SeenOutput

    find_trunk(model).layers[0].register_forward_hook(stop)
    try:
        # With a cache, because without one the positions are searched for packed sequences by value.
        model(inputs_embeds=embedded, use_cache=True)
    except _SeenOutput:
        pass
    return isinstance(seen[0], tuple)
