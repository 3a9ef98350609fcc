"""Whose adapters are held, and which go when others come. No I/O, and no look into them.

An adapter belongs to the peer that uploaded it and is found under that peer's id only. There are
limits on the size of one, on the number and size of one peer's together, and on the size of all.
A peer's new adapter takes the place of its own least recently used ones; those of others go only
when they have not been used for `IDLE_SECONDS`. Whoever needs an adapter that is gone is told so
and uploads it again.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from swarm_notebook.errors import BadRequest, CacheFull

IDLE_SECONDS = 60.0

V = TypeVar("V")


@dataclass(frozen=True)
class AdapterLimits:
    """What a server accepts.

    Attributes:
        rank: the largest rank.
        bytes: the size of one adapter, and of one peer's together.
        number: how many one peer may have.
        total: the size of all.
    """

    rank: int = 256
    bytes: int = 256 << 20
    number: int = 8

    @property
    def total(self) -> int:
        return 4 * self.bytes


@dataclass
class _Held(Generic[V]):
    value: V
    size: int
    used: float


class AdapterStore(Generic[V]):
    """Adapters by peer and id, within limits."""

    def __init__(self, limits: AdapterLimits, clock: Callable[[], float] = time.monotonic):
        self.limits = limits
        self.held = 0
        self._clock = clock
        self._adapters: OrderedDict[tuple[str, str], _Held[V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._adapters)

    def values(self) -> list[V]:
        """All adapters that are held."""
        return [held.value for held in self._adapters.values()]

    def get(self, peer: str, name: str) -> V | None:
        """A peer's adapter; it counts as used now."""
        held = self._adapters.get((peer, name))
        if held is None:
            return None
        held.used = self._clock()
        self._adapters.move_to_end((peer, name))
        return held.value

    def make_room(self, peer: str, name: str, size: int) -> None:
        """Drop what has to go so that a peer's adapter of ``size`` bytes fits.

        Raises:
            BadRequest: it is larger than one adapter may be.
            CacheFull: all the room is taken by adapters of others that are in use.
        """
        limits = self.limits
        if size > limits.bytes:
            raise BadRequest(
                f"the adapter takes {size} bytes, this server accepts {limits.bytes}; use a "
                "smaller rank or fewer target modules"
            )
        own = [key for key in self._adapters if key[0] == peer and key[1] != name]
        dropped = [(peer, name)] if (peer, name) in self._adapters else []
        while len(own) + 1 > limits.number or self._size(own) + size > limits.bytes:
            dropped.append(own.pop(0))
        idle = [key for key in self._adapters if key[0] != peer and self._is_idle(key)]
        while self.held - self._size(dropped) + size > limits.total:
            if not idle:
                raise CacheFull(
                    f"no room for an adapter of {size} bytes: others use {self.held} of "
                    f"{limits.total}; try again later or use another server"
                )
            dropped.append(idle.pop(0))
        for key in dropped:
            self._remove(key)

    def put(self, peer: str, name: str, value: V, size: int) -> None:
        """Hold an adapter for which there is room."""
        self._remove((peer, name))
        self._adapters[peer, name] = _Held(value, size, self._clock())
        self.held += size

    def _size(self, keys: list[tuple[str, str]]) -> int:
        return sum(self._adapters[key].size for key in keys)

    def _is_idle(self, key: tuple[str, str]) -> bool:
        return self._adapters[key].used <= self._clock() - IDLE_SECONDS

    def _remove(self, key: tuple[str, str]) -> None:
        held = self._adapters.pop(key, None)
        if held is not None:
            self.held -= held.size
