"""In which order the decoder will call its blocks, and how far one request may reach. Pure code.

The list of blocks belongs to the user: it may be cut short (early exit, pruning), lack or repeat
blocks, and hold modules that are no blocks of ours, or wrap one. A request may run ahead over a
*stretch*: neighbouring remote blocks which are called one after the other and nothing between.
Where a stretch ends, the true hidden states are handed out.

What is planned here is only a guess at what the decoder does. A wrong one costs a request more, or
is refused (see `runner`); it changes no result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from swarm_notebook.model.blocks.remote import SwarmBlock


@dataclass(frozen=True)
class Layout:
    """The calls of one run of the decoder.

    Attributes:
        order: the blocks in the order of their calls.
        home: those of all blocks that run in the notebook.
        cuts: places in ``order`` (0 to its length) at which true hidden states are needed.
    """

    order: tuple[int, ...]
    home: frozenset[int]
    cuts: frozenset[int]

    @cached_property
    def ascending(self) -> bool:
        """Whether each block comes at most once, and after those before it."""
        return all(one < two for one, two in zip(self.order, self.order[1:], strict=False))

    @cached_property
    def one_stretch(self) -> bool:
        """Whether all calls are one stretch of remote blocks."""
        return bool(self.order) and not self.home and len(self.cuts) == 2

    def absent(self, num_blocks: int) -> frozenset[int]:
        """Blocks that no server computes."""
        return self.home | (frozenset(range(num_blocks)) - frozenset(self.order))

    def find(self, block: int, place: int) -> int | None:
        """The next place from ``place`` on at which ``block`` is called."""
        try:
            return self.order.index(block, place)
        except ValueError:
            return None

    def stretch_end(self, place: int) -> int:
        """The block before which the stretch that begins at ``place`` ends."""
        end = place + 1
        while end not in self.cuts:
            end += 1
        return self.order[end - 1] + 1


def plan(layers: Iterable[nn.Module], blocks: Sequence[nn.Module], home: frozenset[int]) -> Layout:
    """The layout of the decoder's present list of ``layers``.

    Args:
        blocks: all blocks of the model in their own order.
        home: those that run in the notebook.
    """
    order: list[int] = []
    cuts = {0}
    for layer in layers:
        index = layer._index if isinstance(layer, SwarmBlock) else None
        if index is not None and blocks[index] is layer:
            inside = [index]
            foreign = False
        else:
            inside = [one._index for one in layer.modules() if isinstance(one, SwarmBlock)]
            foreign = True
        for index in inside:
            place = len(order)
            follows = bool(order) and order[-1] == index - 1
            if foreign or not follows or index in home or order[-1] in home:
                cuts.add(place)
            order.append(index)
        if foreign:
            cuts.add(len(order))
    cuts.add(len(order))
    return Layout(tuple(order), home, frozenset(cuts))
