"""Single tensors of blocks, read when somebody asks for their values and not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swarm_notebook.checkpoint.files.quantised import method_of
from swarm_notebook.checkpoint.files.weights import block_index
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import ModelNotFound
from swarm_notebook.progress import Waiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swarm_notebook.checkpoint.files.source import ModelSource


class BlockTensors:
    """The tensors in the blocks of a checkpoint, by the names that the model gives them.

    Args:
        source: the checkpoint.
        model: a model of it, to know whether loading changes more than names.
    """

    def __init__(self, source: ModelSource, model: PreTrainedModel):
        self._source, self._dtype = source, model.dtype
        self._as_stored = not _converts(model) and not method_of(source.config())

    def read(self, block: int, name: str) -> torch.Tensor:
        """The tensor ``name`` of a block, in the dtype that the model was built with.

        Raises:
            ModelNotFound: the checkpoint lacks it.
        """
        with Waiting(f"Reading {name} of block {block} of {self._source.name}"):
            found = self._stored(block, name) if self._as_stored else None
            return self._loaded(block, name) if found is None else found

    def _stored(self, block: int, name: str) -> torch.Tensor | None:
        """It alone, if the checkpoint has it under its own name."""
        weights = self._source.weights()
        named = [
            stored
            for stored in weights.names()
            if block_index(stored) == block and stored.endswith(f".{block}.{name}")
        ]
        if len(named) != 1:
            return None
        tensor = weights.lazy(named)[named[0]].read()
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _loaded(self, block: int, name: str) -> torch.Tensor:
        """Out of the whole block, as transformers loads it."""
        (layer,) = load_blocks(self._source, block, block + 1, dtype=self._dtype).layers
        found = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}.get(name)
        if found is None:
            raise ModelNotFound(f"{self._source.name}: block {block} has no {name}")
        return found.detach()


def _converts(model: PreTrainedModel) -> bool:
    """Whether transformers splits, joins or turns weights of this model while it loads them."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import extract_weight_conversions_for_model
    from transformers.core_model_loading import WeightConverter

    models = [one for one in model.modules() if isinstance(one, PreTrainedModel)]
    found = [extract_weight_conversions_for_model(one) or [] for one in models]
    return any(isinstance(step, WeightConverter) for steps in found for step in steps)
