"""An uploaded adapter: what its modules follow from, and its parameters.

Whoever makes one has checked it as far as the bytes alone allow; whether the parameters are those
of the model's modules is for `injection` to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swarm_notebook.server.adapters.config import TunerConfig


@dataclass(frozen=True)
class Recipe:
    """What the modules of an adapter follow from.

    Attributes:
        blocks: the blocks that it is for.
        prefix: what the notebook's model calls the list of blocks.
    """

    blocks: tuple[int, int]
    prefix: str
    configs: tuple[TunerConfig, ...]


@dataclass(frozen=True)
class Upload:
    """One state of an adapter.

    Attributes:
        id, version: how requests name it.
        tensors: the parameters by name; views of the received bytes.
        derive: names of parameters that follow from the base weights.
    """

    id: str
    version: int
    recipe: Recipe
    tensors: dict[str, torch.Tensor]
    derive: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        return self.derive | self.tensors.keys()
