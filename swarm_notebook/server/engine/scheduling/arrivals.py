"""Work on its way from the loop to the torch thread, which is woken for as much as it waits for.

Every waking takes the interpreter's lock away from the loop, which has the next steps to read. So
whoever waits says for how many: 32 sessions whose steps come one after the other within
milliseconds wake the thread twice, and not 32 times.
"""

from __future__ import annotations

import sys
from collections import deque
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

W = TypeVar("W")

_NOBODY_WAITS = sys.maxsize


class Arrivals(Generic[W]):
    """A queue that one thread waits for; others put."""

    def __init__(self) -> None:
        self._waiting: deque[W] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._enough = _NOBODY_WAITS

    def put(self, work: W, *, urgent: bool) -> None:
        """Let work arrive; who waits is woken if it is ``urgent``, or as much as is waited for."""
        self._waiting.append(work)
        if urgent or len(self._waiting) >= self._enough:
            self._enough = _NOBODY_WAITS
            self._wake.put(None)

    def take(self) -> list[W]:
        """All that has arrived, in its order; perhaps nothing."""
        # More may come meanwhile, to the right.
        return [self._waiting.popleft() for _ in range(len(self._waiting))]

    def wait(self, count: int, seconds: float | None = None) -> bool:
        """Until ``count`` have arrived, or something urgent; perhaps shorter.

        Returns:
            False if the time is over.
        """
        # Said before it is looked at: what comes in between is seen by one of the two sides.
        self._enough = count
        try:
            if len(self._waiting) < count:
                self._wake.get(timeout=seconds)
        except Empty:
            return False
        finally:
            self._enough = _NOBODY_WAITS
        return True
