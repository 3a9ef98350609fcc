"""Values by key in the order of their last use, with the bytes that each takes.

`adapters.store` and `engine.passes.activation_store` say what of it goes when something new comes.
A store does not look into its values, and belongs to one thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass
class _Entry(Generic[V]):
    value: V
    size: int
    used: float


class LRUStore(Generic[K, V]):
    """A dict that knows sizes and ages.

    Args:
        clock: seconds, monotonic.

    Attributes:
        held: bytes of all values together.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.held: int = 0
        self._clock = clock
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def keys(self) -> list[K]:
        """All keys, the least recently used first."""
        return list(self._entries)

    def values(self) -> list[V]:
        """All values, the least recently used first."""
        return [entry.value for entry in self._entries.values()]

    def get(self, key: K) -> V | None:
        """The value of a key, which counts as used now; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = self._clock()
        self._entries.move_to_end(key)
        return entry.value

    def put(self, key: K, value: V, size: int) -> None:
        """Hold a value of ``size`` bytes, in the place of what had its key."""
        self.remove(key)
        self._entries[key] = _Entry(value, size, self._clock())
        self.held += size

    def remove(self, key: K) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.held -= entry.size

    def remove_if(self, unwanted: Callable[[K, V], bool]) -> None:
        gone = [key for key, entry in self._entries.items() if unwanted(key, entry.value)]
        for key in gone:
            self.remove(key)

    def size(self, key: K) -> int:
        """Bytes of a key's value."""
        return self._entries[key].size

    def idle(self, key: K) -> float:
        """Seconds since a key's value was used."""
        return self._clock() - self._entries[key].used
