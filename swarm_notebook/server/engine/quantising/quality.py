"""How few bits are good enough for a model: measured on its first block, and remembered.

For who says how much memory a server may take, and not at how many bits: the fewest are looked for
with which the block's output is still close to its output as it is. The first block's input is what
the text is embedded as; in later ones a few huge numbers are most of the output, and hide errors.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from swarm_notebook.errors import Unsupported
from swarm_notebook.server.engine.quantising.calibration import calibration_states
from swarm_notebook.server.engine.quantising.measuring import fitting, measure
from swarm_notebook.server.engine.quantising.memory import Memory

if TYPE_CHECKING:
    from swarm_notebook.checkpoint.files.source import ModelSource

logger: logging.Logger = logging.getLogger(__name__)

# Bits per weight that are tried, from few to many; the finest grid has 8 and a scale per row.
LEVELS = (3.0, 3.5, 4.0, 4.25, 4.5, 5.0, 6.5, 8.5)
# Errors of the output, summed over matrices, up to which bits are good enough. The demo model's are
# 0.0020 at 4.5 bits, where perplexity grows by a tenth, and 0.0045 at 4.25, where it grows by 44 %
# (all blocks so, 1,024 tokens of English). Larger models lose less by the same errors.
GOOD_ERROR = 0.003


def least_bits(source: ModelSource, *, dtype: torch.dtype, device: str) -> float:
    """The fewest bits per weight of `LEVELS` that are good enough for a model.

    Raises:
        Unsupported: none are.
    """
    memory = Memory.of_blocks(source, 0, 1, (LEVELS, GOOD_ERROR))
    found = memory.read()
    if isinstance(found, float) and found in LEVELS:
        return found
    states = calibration_states(source, dtype).to(device)
    losses = measure(source, 0, 1, states=states, grids=fitting, dtype=dtype, device=device)
    for bits in LEVELS:
        choice = losses.choose(bits)
        if choice is not None and choice[1] <= GOOD_ERROR:
            logger.info("%.3g bits per weight are good enough: error %.2g", bits, choice[1])
            memory.write(bits)
            return bits
    raise Unsupported(
        f"the blocks of {source.name} lose too much at {LEVELS[-1]:g} bits per weight; give the "
        "--bits that you accept"
    )
