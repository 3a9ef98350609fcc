"""With how many bits per weight blocks are computed, and saying so when that changes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from swarm_notebook.client.servers.routing import RouteSegment, describe_blocks

logger: logging.Logger = logging.getLogger(__name__)

# Whole weights are the same values in any of their dtypes.
WHOLE_BITS = 16


class BitsInUse:
    """How blocks were computed last.

    Attributes:
        by_block: bits per weight.
    """

    def __init__(self) -> None:
        self.by_block: dict[int, float] = {}
        self._told: set[tuple[int, float, float]] = set()

    def use(self, chain: Sequence[RouteSegment]) -> None:
        """Say once when blocks are computed with other weights than before."""
        for segment in chain:
            bits = segment.span.weight_bits
            blocks = range(segment.start, segment.end)
            before = {block: self.by_block.get(block, bits) for block in blocks}
            changed = {
                (block, known, bits)
                for block, known in before.items()
                if min(known, WHOLE_BITS) != min(bits, WHOLE_BITS)
            }
            self.by_block |= dict.fromkeys(blocks, bits)
            if changed - self._told:
                self._told |= changed
                logger.warning(
                    "%s go on with %.3g bits per weight instead of %.3g on %s: results change "
                    "(sn.connect(min_bits=...) refuses coarser weights)",
                    describe_blocks(sorted(block for block, *_ in changed)),
                    bits,
                    next(iter(changed))[1],
                    segment.span.name,
                )
