"""The keys and values of one session, as a `transformers` cache over the hosted blocks.

HF's decoders append to the cache through `update(keys, values, layer_idx)` and ask it for
`get_seq_length()` and `get_mask_sizes()`. This one differs from `DynamicCache` in four ways:

- Memory comes in pages of `PAGE` positions, and new tokens are written in place. A decode step
  copies one token, not the whole history. The session reserves room *before* a step runs
  (`reserve`), so that what is allocated never exceeds what the pool has granted.
- ``layer_idx`` is the block's index in the whole model; the cache holds only ``[start, end)``.
- Sliding-window blocks keep their full length, and the mask does the window. A rollback of any
  depth is therefore always possible, and all kinds of blocks are alike.
- Every block has its own length: a step may rerun only some of the blocks from an earlier
  position (a hook that edits a state asks again from there). `focus` names the blocks of the step,
  whose common length answers the decoder's questions.

The pages of a session are contiguous: growing moves them, every page or eighth part of the length,
which costs a small part of what reading them in every step does. So attention reads plain strided
tensors, with the kernels that every device has, and no copies. Pages scattered in one pool would
need a gather per session, block and step, or a kernel of their own. The bound on the memory of all
sessions is kept by `kv.budget`.

One token of accounting is one row's position through all hosted blocks: ``rows * capacity``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

# Positions: a cache grows by so many, and pages of a pool have so many lines. With fewer the table
# of pages that a captured step reads grows, with more a short session wastes most of its last one.
PAGE = 64
# Room beyond what is needed, as a part of it: growing is seldom, what lies idle is little.
_AHEAD = 8


def grown_capacity(capacity: int, needed: int, limit: int | None = None) -> int:
    """The capacity to allocate for ``needed`` positions: whole pages, not beyond ``limit``."""
    if needed <= capacity:
        return capacity
    pages = -(-(needed + needed // _AHEAD) // PAGE)
    return pages * PAGE if limit is None else max(needed, min(pages * PAGE, limit))


class SessionCache(Cache):
    """Keys and values of the blocks ``[start, end)`` for one session's rows.

    Attributes:
        granule: capacities are multiples of so many positions, if they need not be smaller.
    """

    granule = 1

    start: int
    end: int

    def __init__(self, start: int, end: int):
        super().__init__(layers=[])
        self.start, self.end = start, end
        self.rows: int = 0
        self.capacity: int = 0
        self._lengths = [0] * (end - start)
        # Of every block, ``[rows, heads, capacity, head size]``.
        self._keys: list[torch.Tensor | None] = [None] * (end - start)
        self._values: list[torch.Tensor | None] = [None] * (end - start)
        self._focus = 0

    # What the session asks for, between steps.

    @property
    def tokens(self) -> int:
        """The room that this cache takes, in cache tokens."""
        return self.rows * self.capacity

    @property
    def length(self) -> int:
        """The number of positions that the longest block holds."""
        return max(self._lengths)

    @property
    def empty(self) -> bool:
        return not any(self._lengths)

    def lengths(self, start: int, end: int) -> list[int]:
        """The number of positions in each of the blocks ``[start, end)``."""
        return self._lengths[start - self.start : end - self.start]

    def restart(self, rows: int) -> None:
        """Forget everything; what is written next has ``rows`` rows."""
        self.rows = rows
        count = len(self._lengths)
        self._lengths = [0] * count
        self._keys, self._values = [None] * count, [None] * count

    def copy_from(self, other: SessionCache, length: int) -> None:
        """Hold copies of what another session's cache holds of the first ``length`` positions."""
        self.restart(other.rows)
        self._lengths = [min(held, length) for held in other._lengths]
        for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for index, (store, held) in enumerate(zip(theirs, self._lengths, strict=True)):
                if store is not None:
                    mine[index] = self._moved(store, held, range(other.rows))

    def reserve(self, capacity: int) -> None:
        """Set the positions to allocate; a block moves to storage of this size when it needs it."""
        self.capacity = capacity

    def truncate(self, start: int, end: int, length: int) -> None:
        """Forget what the blocks ``[start, end)`` hold beyond ``length`` positions."""
        blocks = slice(start - self.start, end - self.start)
        self._lengths[blocks] = [min(held, length) for held in self._lengths[blocks]]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Make row ``i`` a copy of what row ``rows[i]`` was; the number of rows may change."""
        moved = [index for index, row in enumerate(rows) if index != row]
        same_count = len(rows) == self.rows
        if same_count and not moved:
            return
        self.rows = len(rows)
        for stores in (self._keys, self._values):
            for index, (store, length) in enumerate(zip(stores, self._lengths, strict=True)):
                if store is None:
                    continue
                if same_count:
                    used = store.narrow(2, 0, length)
                    used[moved] = used[[rows[row] for row in moved]]
                else:
                    stores[index] = self._moved(store, length, rows)

    def stores(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The keys and values of every block that has some."""
        return [
            (keys, values)
            for keys, values in zip(self._keys, self._values, strict=True)
            if keys is not None and values is not None
        ]

    def release(self) -> None:
        """Give back what is not the session's alone; it will not run again."""

    def focus(self, start: int, end: int) -> int:
        """Name the blocks of the next step; their common length answers the decoder's questions."""
        lengths = set(self.lengths(start, end))
        if len(lengths) != 1:
            raise ValueError(
                f"blocks [{start}, {end}) hold different numbers of positions {sorted(lengths)}: "
                "truncate them to a common one before the step"
            )
        self._focus = start - self.start
        return lengths.pop()

    # What HF's decoders call, during a step.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new positions to a block in place; views of all its keys and values."""
        block = layer_idx - self.start
        new = key_states.shape[2]
        begin, end = self._lengths[block], self._lengths[block] + new
        keys, values = self._keys[block], self._values[block]
        if keys is None or values is None or end > keys.shape[2]:
            keys = self._keys[block] = self._grown(keys, key_states, begin, end)
            values = self._values[block] = self._grown(values, value_states, begin, end)
        keys.narrow(2, begin, new).copy_(key_states)
        values.narrow(2, begin, new).copy_(value_states)
        self._lengths[block] = end
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The length of a block in the model's numbering, or else of the step's first block.

        Decoders ask for "layer 0" or for an index among the layers they were given; both mean
        the length that all blocks of the step have before it.
        """
        local = layer_idx - self.start
        in_focus = self._focus <= local < len(self._lengths)
        return self._lengths[local if in_focus else self._focus]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def __len__(self) -> int:
        return len(self._lengths)

    def _grown(
        self, store: torch.Tensor | None, states: torch.Tensor, used: int, needed: int
    ) -> torch.Tensor:
        """A store of the reserved capacity (or what is needed) that holds what ``store`` held."""
        rows, heads, _, size = states.shape
        grown = states.new_empty((rows, heads, max(self.capacity, needed), size))
        if store is not None and used:
            grown.narrow(2, 0, used).copy_(store.narrow(2, 0, used))
        return grown

    def _moved(self, store: torch.Tensor, used: int, rows: Sequence[int]) -> torch.Tensor:
        """A store with the selected rows, of the reserved capacity."""
        _, heads, capacity, size = store.shape
        capacity = max(self.capacity, used) or capacity
        moved = store.new_empty((len(rows), heads, capacity, size))
        if used:
            for index, row in enumerate(rows):
                moved[index].narrow(1, 0, used).copy_(store[row].narrow(1, 0, used))
        return moved
