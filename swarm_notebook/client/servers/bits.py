"""With which bits blocks are computed: how many per weight, and whether two have the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from swarm_notebook.checkpoint.packed import AS_PUBLISHED, PACKING_BYTES
from swarm_notebook.client.servers.routing import RouteSegment, describe_blocks

logger: logging.Logger = logging.getLogger(__name__)

# Whole weights are the same values in any of their dtypes.
WHOLE_BITS = 16


def packing_of(segment: RouteSegment) -> bytes | None:
    """What tells the values of some blocks' weights from others; None if nobody knows them.

    Zeros are those of the checkpoint.
    """
    info, count = segment.span.info, segment.end - segment.start
    if info.quant_type in (None, "none") and segment.span.weight_bits >= WHOLE_BITS:
        return AS_PUBLISHED * count
    first, last, told = info.start_block, info.end_block, info.packing
    if told is None or first is None or last is None:
        return None
    begin = PACKING_BYTES * (segment.start - first)
    whole = first <= segment.start and segment.end <= last
    fits = len(told) == PACKING_BYTES * (last - first)
    return told[begin : begin + PACKING_BYTES * count] if whole and fits else None


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
