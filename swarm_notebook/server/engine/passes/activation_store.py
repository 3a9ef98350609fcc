"""Activations of recent forward passes, kept so that a backward need not repeat the forward.

A notebook that trains asks to keep its forward pass under an id of its choice. Nobody pays for that
memory, so there is a budget in bytes for all notebooks together: the least recently used goes
first, everything goes after `KEEP_SECONDS`, and what alone is beyond the budget is not kept.
Nobody is told: whoever finds nothing under an id computes it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from swarm_notebook.server.memory.lru import K, LRUStore, V

# About 1,100 tokens through the 30 blocks of the demo model in float32. Measured: a Llama keeps
# 32 kB per token and block at hidden size 576, and 144 kB at 2,048.
BUDGET_BYTES = 1 << 30
# Training comes back within a step, which takes seconds; a notebook that is edited in between
# computes its forward again.
KEEP_SECONDS = 120.0


class ActivationStore(LRUStore[K, V]):
    """What is kept, by key, within ``total`` bytes."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic):
        super().__init__(clock)
        self.total = total

    def make_room(self, size: int) -> bool:
        """Drop the least recently used until ``size`` bytes are free; False if they never are."""
        if size > self.total:
            return False
        for key in self.keys():
            if self.held + size <= self.total:
                break
            self.remove(key)
        return True

    def put(self, key: K, value: V, size: int) -> None:
        """Keep a value of ``size`` bytes, if it fits, in the place of what had its key."""
        self.remove(key)
        if self.make_room(size):
            super().put(key, value, size)

    def get(self, key: K) -> V | None:
        """What is kept under a key, which counts as used now; None if there is nothing."""
        self.expire()
        return super().get(key)

    def expire(self) -> None:
        """Drop what has not been used for `KEEP_SECONDS`."""
        self.remove_if(lambda key, _: self.idle(key) > KEEP_SECONDS)
