"""Where a transformers model keeps its decoder blocks, and what surrounds them.

Nothing here knows an architecture by name. The decoder's blocks are the outermost ``ModuleList``
that has ``config.num_hidden_layers`` members; the *trunk* is the chain of modules from the model
down to the one that owns this list (``OPTModel`` → ``OPTDecoder``; most models own it themselves).
What hangs off the trunk beside the blocks is of three kinds:

- an embedding: makes the hidden states (tokens), or adds to them (learned positions);
- a norm or a projection: maps them before the first or after the last block;
- the rest, without parameters: rotary embeddings and the like compute something from positions.
"""

from __future__ import annotations

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
    """Make `config` describe blocks start..end-1: their number, and what it lists per block."""
    total = config.num_hidden_layers
    for name, value in list(config.to_dict().items()):
        listed_per_block = isinstance(value, list) and len(value) == total and "layer" in name
        if listed_per_block:
            setattr(config, name, value[start:end])
    config.num_hidden_layers = end - start


def context_length(config: PreTrainedConfig) -> int | None:
    """How many positions a model has; None where nothing limits them.

    Rotary embeddings that were rescaled (YaRN and others) are made to go beyond the length that
    the config names.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    # One description, or a dict with one for each kind of block.
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    if any(kind.get("rope_type", "default") != "default" for kind in kinds):
        return None
    return getattr(config, "max_position_embeddings", None)


class Nothing(nn.Module):
    """Stands for an embedding: adds exactly nothing, in any shape and dtype."""

    def forward(self, *inputs: Any, **_named: Any) -> torch.Tensor:
        # Where it will be added: a step on a card that is captured copies nothing from elsewhere.
        first = inputs[0] if inputs else None
        device = first.device if isinstance(first, torch.Tensor) else None
        return torch.zeros((), device=device)


def silence_branches(trunk: Trunk) -> None:
    """Replace embeddings, norms and projections beside the blocks by what changes nothing."""
    for owner, name, child in trunk.branches():
        if isinstance(child, nn.Embedding):
            setattr(owner, name, Nothing())
        elif isinstance(child, nn.Linear) or _is_norm(child):
            setattr(owner, name, nn.Identity())
        elif next(child.parameters(), None) is not None:
            raise Unsupported(
                f"{type(owner).__name__}.{name} ({type(child).__name__}) is neither an embedding "
                "nor a norm nor a projection, so the blocks of this architecture cannot be served"
            )
    for owner in trunk.modules:
        if owner._parameters:
            raise Unsupported(
                f"{type(owner).__name__} has weights outside of its blocks "
                f"({', '.join(owner._parameters)}), so its blocks cannot be served alone"
            )


def _is_norm(module: nn.Module) -> bool:
    # transformers itself knows norms by their class names; there are too many classes.
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


class _Seen(Exception):
    """Stops a forward pass behind the first block."""


def returns_tuple(model: PreTrainedModel, trunk: Trunk) -> bool:
    """Whether a block returns a tuple (BLOOM, Falcon) or a tensor. `model` must be on meta.

    Annotations lie (Gemma 3 announces a tuple and returns a tensor), so the first block is run, on
    tensors without values. Attention and experts are set to the implementations that never ask
    for a value, and rotary embeddings to the kind that does not look for the longest sequence.
    """
    config = model.config
    implementations = config._attn_implementation, config._experts_implementation
    outputs: list[Any] = []

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output)
        raise _Seen

    table: Any = model.get_input_embeddings().weight
    rotary: dict[Any, Any] = {
        module: module.rope_type for module in model.modules() if hasattr(module, "rope_type")
    }
    embedded = torch.zeros(1, 1, table.shape[1], dtype=model.dtype, device="meta")
    try:
        config._attn_implementation, config._experts_implementation = "eager", "batched_mm"
        for module, kinds in rotary.items():
            module.rope_type = (
                dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
            )
        with trunk.layers[0].register_forward_hook(stop):
            # With a cache: without one, positions are searched for packed sequences, by value.
            model.base_model(inputs_embeds=embedded, use_cache=True)
    except _Seen:
        return isinstance(outputs[0], tuple)
    except (RuntimeError, ValueError) as error:
        raise Unsupported(
            f"{type(model).__name__}: its blocks cannot be run on shapes alone ({error}), so it is "
            "not known what they return"
        ) from error
    finally:
        config._attn_implementation, config._experts_implementation = implementations
        for module, kinds in rotary.items():
            module.rope_type = kinds
    raise Unsupported(f"{type(model).__name__} does not call its blocks one after another")
