"""How large the blocks of a model are, from its config and the headers of its files alone.

The model is built by its own transformers class on meta, where tensors have shapes and no memory,
and takes one token, so that its cache says what keys and values a block keeps. So nothing here
knows an architecture. Headers of safetensors files say in how many bits the weights are stored.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm_notebook.checkpoint.anatomy import find_trunk
from swarm_notebook.checkpoint.files import hub
from swarm_notebook.checkpoint.files.gguf import GgufWeights
from swarm_notebook.checkpoint.files.source import ModelSource, resolve
from swarm_notebook.checkpoint.files.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    Weights,
    block_index,
    from_folder,
)
from swarm_notebook.errors import Unsupported

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# What models call the number of experts that a token goes through.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class BlockShape:
    """One block.

    Attributes:
        matrices: weights that tokens are multiplied by; `--bits` is about them.
        experts: those of them that belong to experts.
        vectors: other weights (norms, biases), which stay in the precision of the computation.
        cache: numbers that are kept per position: keys and values.
    """

    matrices: int
    experts: int
    vectors: int
    cache: int


@dataclass(frozen=True)
class ModelShape:
    """A model as `placement` needs it.

    Attributes:
        name: for people.
        edges: weights outside of the blocks (embeddings, final norm, head), which the notebook has.
        head: those of them that a token is multiplied by at the end.
        context: positions that the model was made for; None if its config does not say.
        chosen: the part of the experts that a token goes through.
        stored_bits: per weight of the blocks, in the files; None where only a config is known.
    """

    name: str
    blocks: tuple[BlockShape, ...]
    hidden_size: int
    edges: int
    head: int
    context: int | None
    chosen: float = 1.0
    stored_bits: float | None = None

    @property
    def parameters(self) -> int:
        return self.edges + sum(block.matrices + block.vectors for block in self.blocks)

    def read(self, block: BlockShape, rows: int) -> float:
        """Matrix weights that a step of so many rows reads from memory, on average."""
        touched = 1 - (1 - self.chosen) ** rows
        return block.matrices - block.experts + touched * block.experts

    def multiplied(self, block: BlockShape) -> float:
        """Matrix weights that one token is multiplied by."""
        return block.matrices - block.experts + self.chosen * block.experts


def read_shape(model: str | os.PathLike[str] | PreTrainedConfig | None) -> ModelShape:
    """The shape of a folder, a config file, a GGUF file, a Hub id, a config, or the demo model.

    Raises:
        ModelNotFound: there is no such model, or no metadata of it can be had.
        Unsupported: it is not a causal language model of blocks.
    """
    if model is not None and not isinstance(model, (str, os.PathLike)):
        return shape_of(model, name=model.name_or_path or model.model_type)
    path = Path(model).expanduser() if model is not None else None
    if path is not None and path.is_file() and path.suffix == ".json":
        path = path.parent
    known = path is not None and (path / "config.json").is_file()
    is_file = path is not None and path.is_file()
    if known or is_file or model is None:
        source = resolve(path, dummy=known)
    else:
        source = resolve(model, dummy=hub.is_repository_name(os.fspath(model)))
    stored = _stored_bytes(source)
    return shape_of(source.config(), name=_title(source), stored=stored)


def shape_of(
    config: PreTrainedConfig, *, name: str, stored: dict[int, int] | None = None
) -> ModelShape:
    """The shape of what a config describes; ``stored`` are bytes in the files, by block."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unsupported(
            f"{name} is a {config.model_type!r}: only causal language models have "
            "blocks that can be planned"
        )
    config = copy.deepcopy(config)  # it is told below how to run
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = model_class(config)
    trunk = find_trunk(model)
    caches = _cached_numbers(model)
    blocks = tuple(_block(layer, cache) for layer, cache in zip(trunk.layers, caches, strict=True))
    head = model.get_output_embeddings()
    weights = sum(block.matrices + block.vectors for block in blocks)
    stored_bits = 8 * sum(stored.values()) / weights if stored else None
    return ModelShape(
        name,
        blocks,
        config.hidden_size,
        sum(parameter.numel() for parameter in model.parameters()) - weights,
        head.weight.numel() if head is not None else 0,
        getattr(config, "max_position_embeddings", None),
        _chosen(config, trunk.layers),
        stored_bits,
    )


def _block(layer: nn.Module, cache: int) -> BlockShape:
    parameters = list(layer.parameters())
    return BlockShape(
        sum(p.numel() for p in parameters if p.ndim >= 2),
        sum(p.numel() for p in parameters if p.ndim == 3),
        sum(p.numel() for p in parameters if p.ndim < 2),
        cache,
    )


def _chosen(config: PreTrainedConfig, layers: Iterable[nn.Module]) -> float:
    """The part of stacked experts that a token goes through."""
    stacked = {p.shape[0] for layer in layers for p in layer.parameters() if p.ndim == 3}
    chosen = next((getattr(config, name) for name in _CHOSEN if hasattr(config, name)), None)
    return min(1.0, chosen / max(stacked)) if stacked and chosen else 1.0


def _cached_numbers(model: PreTrainedModel) -> list[int]:
    """How many numbers each block's cache has after one token."""
    import torch

    config = model.config
    config._attn_implementation, config._experts_implementation = "eager", "batched_mm"
    table: Any = model.get_input_embeddings().weight
    embedded = torch.zeros(1, 1, table.shape[1], dtype=model.dtype, device="meta")
    try:
        cache: Any = model.base_model(inputs_embeds=embedded, use_cache=True).past_key_values
        return [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise Unsupported(
            f"{type(model).__name__}: its blocks cannot be run on shapes alone ({error}), so what "
            "they keep per token is not known"
        ) from error


def _title(source: ModelSource) -> str:
    return source.name if source.path is None else source.path.name


def _stored_bytes(source: ModelSource) -> dict[int, int] | None:
    """Bytes of each block in the files, if there are files to look at."""
    if source.path is None:
        return _on_the_hub(source.name)
    weights: Weights
    if source.is_gguf:
        weights = GgufWeights(source.path, source.config())
    elif any((source.path / name).is_file() for name in (INDEX_FILE, SINGLE_FILE)):
        weights = from_folder(source.path)
        if not weights.here:
            return None
    else:
        return None
    return _by_block((name, one.nbytes) for name, one in weights.lazy(weights.names()).items())


def _on_the_hub(name: str) -> dict[int, int] | None:
    """From the headers of the files there; none of the weights are fetched."""
    if not hub.reachable():
        return None
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        files = get_safetensors_metadata(name).files_metadata.values()
    except (NotASafetensorsRepoError, HfHubHTTPError, OSError):
        return None
    return _by_block(
        (tensor, info.data_offsets[1] - info.data_offsets[0])
        for file in files
        for tensor, info in file.tensors.items()
    )


def _by_block(entries: Iterable[tuple[str, int]]) -> dict[int, int]:
    found: dict[int, int] = {}
    for name, count in entries:
        index = block_index(name)
        if index is not None:
            found[index] = found.get(index, 0) + count
    return found
