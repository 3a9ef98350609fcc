"""What plain LoRA adds to a module's output, for rows that have an adapter each.

PEFT's layer of a row is called for every module and adapter: hundreds of small calls a step, which
`mixing` makes one after the other, and no graph can launch. What a plain layer adds follows from
two matrices and a number (Hu et al. 2021), so a table can say it for each row of a step and each
tuned module: where the matrices lie, their rank and their scale (see `steps.row_adapters`).
`low_rank_kernel` reads them there, as Punica does (Chen et al. 2023): no adapter is copied or
merged, and one graph serves whoever shares a step.

Which layers are plain is tried when an adapter comes (`injection`): their own forward decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from swarm_notebook.server.adapters.mixing import Site

# Beyond it the products are no small ones any more, and layers compute for themselves.
MAX_RANK = 256
# What the kernel reads at once, and so the ranks that graphs are captured for.
RANKS = 16
# Of a row at a module. A rank of 0: it has no adapter there.
DOWN, UP, RANK, HALF, SCALE, COLUMNS = range(6)
# How far a layer's own output may be from this arithmetic, relative to its size: some roundings.
_CLOSE, _CLOSE_HALF = 1e-3, 5e-2


@dataclass(frozen=True, eq=False)
class LowRank:
    """What a layer adds to its module's output: ``scale * up @ (down @ x)``.

    Attributes:
        down: ``[rank, input size]``.
        up: ``[output size, rank]``.
    """

    down: nn.Parameter
    up: nn.Parameter
    scale: float

    @classmethod
    def of(cls, layer: Any) -> LowRank | None:
        """What a layer of PEFT says of itself; None if it says anything else."""
        from peft.tuners import lora

        if type(layer) is not lora.Linear or layer.disable_adapters or layer.merged:
            return None
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(names) != 1 or layer.lora_variant:
            return None
        (name,) = names
        products: list[Any] = [layer.lora_A[name], layer.lora_B[name]]
        scale: Any = layer.scaling[name]
        if any(type(one) is not nn.Linear or one.bias is not None for one in products):
            return None
        # A tensor has another value as soon as the adapter has been uploaded anew.
        if type(scale) not in {int, float}:
            return None
        return cls(products[0].weight, products[1].weight, float(scale))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def added(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The module's output for ``x`` with this."""
        inner = nn.functional.linear(x.to(self.down.dtype), self.down)
        return (output + nn.functional.linear(inner, self.up) * self.scale).to(output.dtype)


class Additions:
    """What an adapter adds, all in all.

    Args:
        layers: by the modules around which they are.

    Attributes:
        names: of the modules within their blocks.
        rank: the largest.
        version: another one as soon as other matrices have taken their places.
    """

    version: int

    def __init__(self, layers: Mapping[Site, LowRank]):
        self._layers = layers
        self.names: frozenset[str] = frozenset(name for _, name in layers)
        self.rank: int = max(layer.rank for layer in layers.values())
        self.version = 0

    @classmethod
    def of(cls, layers: Mapping[Site, nn.Module], dtype: torch.dtype) -> Additions | None:
        """What the layers of an adapter add; None if one of them is not plain.

        Args:
            dtype: of the blocks.
        """
        found = {site: plain for site, layer in layers.items() if (plain := LowRank.of(layer))}
        if not found or len(found) < len(layers):
            return None
        weights = [weight for plain in found.values() for weight in (plain.down, plain.up)]
        known = all(one.dtype in (torch.float32, dtype) and one.is_contiguous() for one in weights)
        alike = all(plain.down.dtype == plain.up.dtype for plain in found.values())
        additions = cls(found)
        return additions if known and alike and additions.rank <= MAX_RANK else None

    def get(self, site: Site) -> LowRank | None:
        """What is added to a module's output."""
        return self._layers.get(site)

    def agrees(self, site: Site, layer: Any, x: torch.Tensor, output: torch.Tensor) -> bool:
        """Whether a layer, which gave this output, does what is told of it here."""
        expected = self._layers[site].added(x, layer.get_base_layer()(x)).float()
        close = _CLOSE if self._layers[site].down.dtype == torch.float32 else _CLOSE_HALF
        return bool((output.float() - expected).norm() <= close * expected.norm())

    def changed(self) -> None:
        """Say that the matrices have other values, and so other places."""
        self.version += 1

    def column(self, sites: Sequence[Site]) -> np.ndarray:
        """``[sites, COLUMNS]`` for a row that has this adapter, in its present version."""
        column = np.zeros((len(sites), COLUMNS), np.int64)
        for line, site in zip(column, sites, strict=True):
            if plain := self._layers.get(site):
                half = plain.down.dtype != torch.float32
                bits = np.float32(plain.scale).view(np.int32)
                line[:] = plain.down.data_ptr(), plain.up.data_ptr(), plain.rank, half, bits
        return column
