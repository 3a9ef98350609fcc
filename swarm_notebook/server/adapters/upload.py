"""An uploaded adapter: what its layers are made of, and its tensors.

Whoever makes one has checked it as far as the bytes alone allow; whether the layers fit the
model's modules is for `injection` to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from swarm_notebook.server.adapters.layers import BlockDescription

# Bytes of a module besides its tensors: an empty one takes 2 kB (measured with tracemalloc), and
# those of PEFT have more attributes.
MODULE_BYTES = 3 << 10


@dataclass(frozen=True)
class Recipe:
    """What the layers of an adapter follow from; equal ones differ in the tensors' values alone.

    Attributes:
        blocks: the blocks that it is for.
        text: the description.
        tensors: name, dtype and shape of each tensor.
    """

    blocks: tuple[int, int]
    text: bytes
    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Upload:
    """One state of an adapter.

    Attributes:
        id, version: how requests name it.
        layers: the description, read.
        tensors: parameters and buffers by name; views of the received bytes.
    """

    id: str
    version: int
    recipe: Recipe
    layers: Mapping[int, BlockDescription]
    tensors: Mapping[str, torch.Tensor]

    @property
    def size(self) -> int:
        """The bytes that this adapter takes."""
        weights = sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())
        return weights + MODULE_BYTES * self.recipe.text.count(b'"class"')


def recipe_of(blocks: tuple[int, int], text: bytes, tensors: Mapping[str, torch.Tensor]) -> Recipe:
    """What the layers follow from, of a description and the tensors that came with it."""
    shapes = tuple(
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())
    )
    return Recipe(blocks, text, shapes)
