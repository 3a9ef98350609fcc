"""Whose adapters are held, and which go when others come. No I/O, and no look into them.

An adapter belongs to the peer that uploaded it and is found under that peer's id only. There are
limits on the size of one, on the number and size of one peer's together, and on the size of all.
A peer's new adapter takes the place of its own least recently used ones; those of others go only
when they have not been used for `IDLE_SECONDS`. Whoever needs an adapter that is gone is told so
and uploads it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from swarm_notebook.errors import BadRequest, CacheFull
from swarm_notebook.server.memory.lru import LRUStore, V

# Longer than a step of training over a slow link, so that nobody loses an adapter between two.
IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class AdapterLimits:
    """What a server accepts.

    Attributes:
        bytes: the size of one adapter, and of one peer's together.
        number: how many one peer may have.
        total: the size of all.
    """

    bytes: int = 256 << 20
    number: int = 8

    @property
    def total(self) -> int:
        return 4 * self.bytes


class AdapterStore(LRUStore[tuple[str, str], V]):
    """Adapters by peer and id, within limits."""

    def __init__(self, limits: AdapterLimits, clock: Callable[[], float] = time.monotonic):
        super().__init__(clock)
        self.limits = limits

    def make_room(self, key: tuple[str, str], size: int) -> None:
        """Drop what has to go so that an adapter of ``size`` bytes fits under ``key``.

        Raises:
            BadRequest: it is larger than one adapter may be.
            CacheFull: all the room is taken by adapters of others that are in use.
        """
        limits, peer = self.limits, key[0]
        if size > limits.bytes:
            raise BadRequest(
                f"the adapter takes {size} bytes, this server accepts {limits.bytes}; use a "
                "smaller rank or fewer target modules"
            )
        own = [other for other in self.keys() if other[0] == peer and other != key]
        dropped = [key] if key in self else []
        while len(own) + 1 > limits.number or self._sizes(own) + size > limits.bytes:
            dropped.append(own.pop(0))
        idle = [
            other for other in self.keys() if other[0] != peer and self.idle(other) >= IDLE_SECONDS
        ]
        while self.held - self._sizes(dropped) + size > limits.total:
            if not idle:
                raise CacheFull(
                    f"no room for an adapter of {size} bytes: others use {self.held} of "
                    f"{limits.total}; try again later or use another server"
                )
            dropped.append(idle.pop(0))
        for other in dropped:
            self.remove(other)

    def _sizes(self, keys: Iterable[tuple[str, str]]) -> int:
        return sum(map(self.size, keys))
