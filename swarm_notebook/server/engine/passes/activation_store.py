"""Activations of recent forward passes, kept so that a backward need not repeat the forward.

A notebook that trains asks to keep its forward pass under an id of its choice. Nobody pays for that
memory, so there is a budget in bytes for all notebooks together: what goes first is the least
recently used of the one that holds most, so that nobody drives out those who hold less; everything
goes after `KEEP_SECONDS`, and what finds no room is not kept. Nobody is told: whoever finds nothing
under an id computes it again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from swarm_notebook.server.memory.lru import LRUStore, V

# About 1,100 tokens through the 30 blocks of the demo model in float32. Measured: a Llama keeps
# 32 kB per token and block at hidden size 576, and 144 kB at 2,048.
BUDGET_BYTES = 1 << 30
# Training comes back within a step, which takes seconds; a notebook that is edited in between
# computes its forward again.
KEEP_SECONDS = 120.0


class ActivationStore(LRUStore[tuple[str, str], V]):
    """What is kept, by peer and id, within ``total`` bytes."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic):
        super().__init__(clock)
        self.total = total
        self._held_by = Counter[str]()

    def make_room(self, peer: str, size: int) -> bool:
        """Drop what has to go for ``size`` more bytes of a peer; False if they do not fit."""
        if size > self.total:
            return False
        while self.held + size > self.total:
            held = self._held_by + Counter({peer: size})
            most = max(held, key=lambda one: (held[one], one != peer))
            if not self._held_by[most]:
                return False
            self.remove(next(key for key in self._entries if key[0] == most))
        return True

    def put(self, key: tuple[str, str], value: V, size: int) -> None:
        """Keep a value of ``size`` bytes, if it fits, in the place of what had its key."""
        self.remove(key)
        if self.make_room(key[0], size):
            super().put(key, value, size)
            self._held_by[key[0]] += size

    def get(self, key: tuple[str, str]) -> V | None:
        """What is kept under a key, which counts as used now; None if there is nothing."""
        self.expire()
        return super().get(key)

    def remove(self, key: tuple[str, str]) -> None:
        if key in self:
            self._held_by -= Counter({key[0]: self.size(key)})  # which forgets who has nothing
        super().remove(key)

    def expire(self) -> None:
        """Drop what has not been used for `KEEP_SECONDS`."""
        self.remove_if(lambda key, _: self.idle(key) > KEEP_SECONDS)
