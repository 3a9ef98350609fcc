"""Where the time of a step goes inside of a server, told to the client along with the answer.

Three parts: taking the request apart and putting the answer together, waiting for the torch
thread, computing. The torch thread adds what it computes; the rest of the time between is waiting.
"""

from __future__ import annotations

import time


class StepTimes:
    """The parts of one step, from its arrival on."""

    __slots__ = ("_arrived", "_computed", "_parsed", "compute")

    def __init__(self) -> None:
        self._arrived = self._parsed = self._computed = time.perf_counter()
        self.compute = 0.0

    def parsed(self) -> None:
        self._parsed = time.perf_counter()

    def computed(self) -> None:
        self._computed = time.perf_counter()

    def parts(self) -> list[float]:
        """Seconds of serialisation, queue and compute, when the answer is packed."""
        serialisation = self._parsed - self._arrived + time.perf_counter() - self._computed
        queue = max(0.0, self._computed - self._parsed - self.compute)
        return [serialisation, queue, self.compute]
