"""What rounding each matrix of some blocks to each grid costs, and the grids of a budget.

Each matrix is rounded alone, and the output of its block compared with the output as it is, on two
texts: errors on one choose (`allocation`), and the choice is kept only if its errors on the other
are smaller than those of one grid for all in the same budget.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm_notebook.checkpoint.packed import Grid, matrices, pack
from swarm_notebook.checkpoint.parts.partial import LoadedBlocks, load_blocks
from swarm_notebook.errors import ModelNotFound
from swarm_notebook.server.engine.quantising.allocation import Choice, allocate

if TYPE_CHECKING:
    from collections.abc import Callable

    from swarm_notebook.checkpoint.files.source import ModelSource

logger: logging.Logger = logging.getLogger(__name__)

# From coarse to fine: 2.5, 3.5, 4.25, 4.5, 5 and 8 bits with scales and offsets.
GRIDS = (Grid(2, 64), Grid(3, 64), Grid(4, 128), Grid(4, 64), Grid(4, 32), Grid(8, 0))
# For widths that are no multiple of 32.
NARROW = (Grid(2, 16), Grid(3, 16), Grid(4, 16), Grid(8, 0))
# So many grids around the budget are measured: further ones are hardly ever chosen.
_MEASURED_BELOW, _MEASURED_ABOVE = 2, 3


@dataclass
class Losses:
    """Of every matrix, in their order: its grids, and the errors that each of them makes.

    Attributes:
        errors: by grid, of the block's output on either text (`output_error`).
    """

    shapes: list[torch.Size] = field(default_factory=list)
    grids: list[list[Grid]] = field(default_factory=list)
    errors: list[list[tuple[float, float]]] = field(default_factory=list)

    def choose(self, bits: float) -> tuple[list[Grid], float] | None:
        """The grids that are worth most within a budget, and their errors on the other text.

        Args:
            bits: per weight, on average.

        Returns:
            None if no grids are so small. The errors are summed over all matrices.
        """
        budget = bits * sum(shape.numel() for shape in self.shapes)
        items = [
            [
                Choice(shape.numel() * grid.cost(shape), loss[0])
                for grid, loss in zip(row, losses, strict=True)
            ]
            for shape, row, losses in zip(self.shapes, self.grids, self.errors, strict=True)
        ]
        found = []
        for picked in (allocate(items, budget), self._uniform(bits)):
            if picked is not None:
                worth = sum(row[index][1] for row, index in zip(self.errors, picked, strict=True))
                found.append((worth, picked))
        if not found:
            return None
        if len(found) == 2:
            logger.info("errors on other text: %.3g mixed, %.3g uniform", found[0][0], found[1][0])
        worth, picked = min(found)
        return [row[index] for row, index in zip(self.grids, picked, strict=True)], worth

    def _uniform(self, bits: float) -> list[int] | None:
        """The finest grid within the budget for every matrix, where there is one."""
        found = []
        for row, shape in zip(self.grids, self.shapes, strict=True):
            within = [index for index, grid in enumerate(row) if grid.cost(shape) <= bits]
            if not within:
                return None
            found.append(within[-1])
        return found


def measure(
    source: ModelSource,
    start: int,
    end: int,
    *,
    states: torch.Tensor,
    grids: Callable[[torch.Size], list[Grid]],
    **options: Any,
) -> Losses:
    """Round each matrix of blocks start..end-1 to each of its ``grids``, one at a time.

    Args:
        states: the input of the first of them, two texts.
        options: ``dtype`` and ``device``, as for `load_blocks`.
    """
    found = Losses()
    for block in range(start, end):
        one = load_blocks(source, block, block + 1, **options)
        (layer,) = one.layers
        weights = importance(one, states)
        output = run(one, states)
        for name, module, attribute, weight in list(matrices(layer)):
            losses = []
            possible = grids(weight.shape)
            for grid in possible:
                rounded = pack(weight.detach(), grid, weights.get(name)).unpack(weight.dtype)
                module._parameters[attribute] = nn.Parameter(rounded, requires_grad=False)
                states_then = run(one, states)
                first, second = (output_error(states_then[row], output[row]) for row in (0, 1))
                losses.append((first, second))
            module._parameters[attribute] = weight
            found.shapes.append(weight.shape)
            found.grids.append(possible)
            found.errors.append(losses)
        states = output
        logger.info("measured what bits are worth in block %d", block)
    return found


def fitting(shape: Sequence[int]) -> list[Grid]:
    """The grids that a matrix can have, from coarse to fine."""
    wide = [grid for grid in GRIDS if grid.fits(shape)]
    narrow = [grid for grid in NARROW if grid.fits(shape)]
    return wide if any(grid.bits < 8 for grid in wide) else narrow or wide


def around(bits: float) -> Callable[[torch.Size], list[Grid]]:
    """The grids of a matrix that are measured for a budget: some on each side of it."""

    def possible(shape: torch.Size) -> list[Grid]:
        grids = fitting(shape)
        below = [grid for grid in grids if grid.cost(shape) <= bits]
        above = [grid for grid in grids if grid.cost(shape) > bits]
        return below[-_MEASURED_BELOW:] + above[:_MEASURED_ABOVE]

    return possible


@torch.inference_mode()
def run(one: LoadedBlocks, states: torch.Tensor) -> torch.Tensor:
    """What a block makes of some texts.

    Raises:
        ModelNotFound: NaN or infinity.
    """
    found = one.model(inputs_embeds=states, use_cache=False).last_hidden_state
    if not found.isfinite().all():
        raise ModelNotFound(
            f"block {one.start} of {one.config.name_or_path} makes NaN or infinity of plain text "
            f"in {found.dtype}: its weights are damaged, or --dtype is too narrow for them"
        )
    return found


def importance(one: LoadedBlocks, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean squares of what each linear layer gets for the first text, by matrix."""
    (layer,) = one.layers
    found: dict[str, torch.Tensor] = {}

    def seen(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = inputs[0].float().square().flatten(0, -2).mean(dim=0)

        return hook

    handles = [
        module.register_forward_pre_hook(seen(name))
        for name, module, _, _ in matrices(layer)
        if type(module) is nn.Linear
    ]
    try:
        run(one, states[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def output_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The mean square of the difference, by the mean square of what is expected."""
    expected = expected.float()
    return float((found.float() - expected).square().mean() / expected.square().mean())
