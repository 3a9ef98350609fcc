"""Keys and values of all sessions in one store per block, where captured steps can find them.

A step that is captured in a CUDA graph reads and writes at addresses that never change. So on a GPU
the sessions of a server keep their keys and values in one `PagePool`, which is allocated once, as
large as the announced budget. It is cut into pages of `PAGE` positions of one row; a `PagedCache`
knows which of them are its own, for all blocks the same. It grows by a page without moving what it
holds; a row that is selected keeps its pages, only one that is repeated is copied.

Whatever runs outside of captured steps (prefills, prompts, adapters) uses the same cache, which
gathers the keys and values of a session into tensors of their own for every block and call. That
costs a small part of a prefill; it is why sessions on CPUs, which gain nothing from fixed
addresses, keep memory of their own (`kv.cache`).

A *line* is one position of one row: ``page * PAGE + position % PAGE``. Page 0 belongs to nobody.
Its line `NOTHING` is never written, so that it always holds zeros: captured steps read it in the
place of what they must not see, for what earlier owners left in a page may not even be finite. In
`NOWHERE` goes what rows that are nobody's write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swarm_notebook.errors import CacheFull
from swarm_notebook.server.engine.kv.cache import PAGE, SessionCache

NOTHING, NOWHERE = 0, 1


@dataclass(frozen=True)
class KVShape:
    """Heads and head sizes of one block."""

    heads: int
    key_size: int
    value_size: int


class PagePool:
    """The store, and which of its pages are free.

    Args:
        start: the first block.
        shapes: of every block from there on.
        tokens: how many positions of one row there is room for.

    Attributes:
        lines: how many lines there are.
        keys, values: of every block, ``[heads, lines, head size]``.
    """

    start: int
    shapes: tuple[KVShape, ...]
    lines: int
    device: torch.device
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def __init__(
        self,
        start: int,
        shapes: Sequence[KVShape],
        tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        pages = 1 + -(-tokens // PAGE)
        self.start, self.shapes = start, tuple(shapes)
        self.lines, self.device = pages * PAGE, device
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.keys = [torch.zeros(s.heads, self.lines, s.key_size, **options) for s in shapes]
        self.values = [torch.zeros(s.heads, self.lines, s.value_size, **options) for s in shapes]
        # Sessions are freed in the loop, and grow in the torch thread; a list's own operations
        # are whole.
        self._free = list(range(pages - 1, 0, -1))
        self.within_page: torch.Tensor = torch.arange(PAGE, device=device)

    @property
    def free(self) -> int:
        """How many pages nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many pages.

        Raises:
            CacheFull: there are fewer.
        """
        taken: list[int] = []
        try:
            while len(taken) < count:
                taken.append(self._free.pop())
        except IndexError:
            self.give(taken)
            raise CacheFull(
                f"{count} more pages of {PAGE} cache tokens are needed, {self.free} are free; "
                "try again later or use another server"
            ) from None
        return taken

    def give(self, pages: Sequence[int]) -> None:
        """Take pages back."""
        self._free.extend(pages)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy what pages hold, in all blocks."""
        origin, goal = self._spread(sources), self._spread(targets)
        for store in (*self.keys, *self.values):
            store[:, goal] = store[:, origin]

    def spread(self, table: torch.Tensor) -> torch.Tensor:
        """The lines of pages ``[rows, pages]``: ``[rows, pages * PAGE]``."""
        return (table[..., None] * PAGE + self.within_page).flatten(-2)

    def _spread(self, pages: Sequence[int]) -> torch.Tensor:
        return self.spread(torch.tensor(pages, device=self.device))


class PagedCache(SessionCache):
    """A session's keys and values in a pool.

    Attributes:
        table: every row's pages, in the order of their positions.
    """

    granule = PAGE

    def __init__(self, pool: PagePool):
        super().__init__(pool.start, pool.start + len(pool.keys))
        self.pool = pool
        self.table: list[list[int]] = []
        self._lines: torch.Tensor | None = None

    def restart(self, rows: int) -> None:
        self.release()
        super().restart(rows)
        self.table = [[] for _ in range(rows)]

    def release(self) -> None:
        table, self.table, self._lines = self.table, [], None
        for pages in table:
            self.pool.give(pages)

    def make_room(self, length: int) -> None:
        """Have pages for so many positions of every row, or for what is reserved.

        Raises:
            CacheFull: there are not enough.
        """
        wanted = max(self.capacity // PAGE, -(-length // PAGE))
        for pages in self.table:
            if len(pages) < wanted:
                pages += self.pool.take(wanted - len(pages))
                self._lines = None

    def advance(self, start: int, end: int, length: int) -> None:
        """The blocks ``[start, end)`` hold ``length`` positions from now on."""
        self._lengths[start - self.start : end - self.start] = [length] * (end - start)

    def select_rows(self, rows: Sequence[int]) -> None:
        before, self.rows, self._lines = self.table, len(rows), None
        for unwanted in set(range(len(before))) - set(rows):
            self.pool.give(before[unwanted])
        used = -(-self.length // PAGE)
        self.table, taken = [], set()
        sources: list[int] = []
        targets: list[int] = []
        for row in rows:
            if row not in taken:
                taken.add(row)
                self.table.append(before[row])
                continue
            self.table.append(self.pool.take(used))
            sources += before[row][:used]
            targets += self.table[-1]
        if sources:
            self.pool.copy(sources, targets)

    def copy_from(self, other: SessionCache, length: int) -> None:
        if not isinstance(other, PagedCache) or other.pool is not self.pool:
            raise TypeError("pages are copied within a pool")
        table = other.table  # it is replaced, and not changed, when they are given back
        self.restart(other.rows)
        self._lengths = [min(held, length) for held in other._lengths]
        self.make_room(self.length)
        used = -(-self.length // PAGE)
        self.pool.copy(
            [page for row in table for page in row[:used]],
            [page for row in self.table[: len(table)] for page in row[:used]],
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new positions of a block; copies of all its keys and values."""
        block = layer_idx - self.start
        begin, end = self._lengths[block], self._lengths[block] + key_states.shape[2]
        self.make_room(end)
        if self._lines is None:
            # A row that was copied has fewer pages than others until it needs them.
            pages = min(map(len, self.table))
            table = torch.tensor([row[:pages] for row in self.table])
            self._lines = self.pool.spread(table.to(self.pool.device))
        new, all_ = self._lines[:, begin:end].flatten(), self._lines[:, :end].flatten()
        gathered = []
        for store, states in (
            (self.pool.keys[block], key_states),
            (self.pool.values[block], value_states),
        ):
            store.index_copy_(1, new, states.transpose(0, 1).flatten(1, 2).to(store.dtype))
            rows = store.index_select(1, all_).unflatten(1, (self.rows, end))
            gathered.append(rows.transpose(0, 1))
        self._lengths[block] = end
        return gathered[0], gathered[1]
