"""ActivationStore of recent forward passes, kept so that a backward need not repeat the forward.

A notebook that trains asks to keep its forward pass under an id of its choice. What is kept is
memory that nobody pays for, so there is a budget in bytes for all notebooks together: the least
recently used goes first, everything goes after `KEEP_SECONDS`, and what alone is beyond the budget
is not kept at all. Nobody is told: whoever finds nothing under an id computes it again.

The store does not look into what it keeps. It belongs to the torch thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

BUDGET_BYTES = 1 << 30
KEEP_SECONDS = 120.0

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass
class _Kept(Generic[V]):
    value: V
    size: int
    used: float


class ActivationStore(Generic[K, V]):
    """What is kept, by key, within ``total`` bytes; ``held`` of them are taken."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic):
        self.total = total
        self._clock = clock
        self._kept: OrderedDict[K, _Kept[V]] = OrderedDict()
        self.held = 0

    def make_room(self, size: int) -> bool:
        """Drop the least recently used until ``size`` bytes are free; False if they never are."""
        if size > self.total:
            return False
        while self.held + size > self.total:
            self._remove(next(iter(self._kept)))
        return True

    def put(self, key: K, value: V, size: int) -> None:
        """Keep a value, if it fits, in the place of what had its key."""
        self._remove(key)
        if self.make_room(size):
            self._kept[key] = _Kept(value, size, self._clock())
            self.held += size

    def get(self, key: K) -> V | None:
        """What is kept under a key; it counts as used now."""
        self.expire()
        kept = self._kept.get(key)
        if kept is None:
            return None
        kept.used = self._clock()
        self._kept.move_to_end(key)
        return kept.value

    def drop(self, unwanted: Callable[[K, V], bool]) -> None:
        """Drop whatever is ``unwanted``."""
        gone = [key for key, kept in self._kept.items() if unwanted(key, kept.value)]
        for key in gone:
            self._remove(key)

    def expire(self) -> None:
        """Drop what has not been used for `KEEP_SECONDS`."""
        since = self._clock() - KEEP_SECONDS
        self.drop(lambda key, _: self._kept[key].used < since)

    def _remove(self, key: K) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.held -= kept.size
