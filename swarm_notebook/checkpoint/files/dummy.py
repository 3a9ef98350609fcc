"""Random weights in the shapes that a config asks for: to measure and plan, never to answer with.

A server with dummy weights needs no checkpoint but its ``config.json``, and loads in the seconds
that its bytes take to copy. What it announces begins with `PREFIX`, so nobody takes it for the
model whose shape it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from swarm_notebook.checkpoint.files.weights import LazyTensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PREFIX = "_dummy-"
# So many random numbers are drawn, and repeated: drawing those of a large model takes minutes.
_DRAWN = 1 << 20
# Small enough that states stay finite through a hundred blocks.
_SPREAD = 0.02


class DummyWeights:
    """A checkpoint that nobody has trained, seen as names of tensors."""

    def __init__(self, config: PreTrainedConfig):
        self._config = config

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        # What is served has passed `ModelSource.config`.
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self._config)]
        with torch.device("meta"):
            model = model_class(self._config)
        return {name: tensor.shape for name, tensor in model.state_dict().items()}

    @cached_property
    def _noise(self) -> torch.Tensor:
        # Said in full: by torch's default dtype the values would be others.
        options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        noise = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0), **options)
        return (noise * _SPREAD).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """What the config says."""
        named = getattr(self._config, "dtype", None)
        return named if isinstance(named, torch.dtype) else torch.float32

    def names(self) -> list[str]:
        return list(self._shapes)

    def lazy(self, names: Iterable[str]) -> dict[str, LazyTensor]:
        return {
            name: LazyTensor(
                partial(self._made, name), math.prod(self._shapes[name]) * self.dtype.itemsize
            )
            for name in names
        }

    def samples(self) -> None:
        return None

    def _made(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) < 2:  # norms and biases
            value = 1.0 if name.endswith("weight") else 0.0
            return torch.full(shape, value, dtype=self.dtype)
        count = math.prod(shape)
        return self._noise.repeat(-(-count // _DRAWN))[:count].view(shape)
