"""The decoder's list of blocks, which may show the decoder's own code less than it holds.

A decoder calls each block of its list. Of a run of remote blocks that nobody observes, only the
first call asks anything, and the others hand on what nobody looks at: at 32 blocks a tenth of the
notebook's time for a token. So while the decoder's ``forward`` runs, and there only, the list may
consist of the first block alone, which then stands for all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, cast

from torch import nn


class BlockList(nn.ModuleList):
    """A list of blocks.

    Attributes:
        shown: what code that iterates over the list sees of it; None for all.
    """

    shown: Callable[[CodeType], list[nn.Module] | None] | None = None

    def _get_name(self) -> str:
        return "ModuleList"

    def __iter__(self) -> Iterator[nn.Module]:
        some = self.shown and self.shown(sys._getframe(1).f_code)
        return super().__iter__() if some is None else iter(some)

    def __getitem__(self, idx: Any) -> Any:
        if self.shown is not None and isinstance(idx, slice):
            some = self.shown(sys._getframe(1).f_code)
            if some is not None:
                return some
        return super().__getitem__(idx)


def watched(layers: nn.ModuleList, shown: Callable[[CodeType], list[nn.Module] | None]) -> None:
    """Make a list of blocks one that asks what to show."""
    layers.__class__ = BlockList
    cast("BlockList", layers).shown = shown
