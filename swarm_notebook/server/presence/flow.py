"""How many tokens per second can flow through a model's blocks, and the most that servers allow.

A server passes so many tokens per second through one block, and shares that between its blocks as
notebooks ask for them: a route takes any part of a span. So what flows through all blocks is a
transport problem, and one that has an order: spans are intervals, and demand is met from the left,
each block by those servers first whose spans end first. Nothing meets more.

The most that any places of the same servers allow has a bound, and nearly its value. Where `rate`
tokens per second are to flow, a server is of use for ``min(size, capacity / rate)`` blocks, so
the sum of these must be all blocks. And servers that are laid in a line, each beginning at the
first block whose demand is not met, come within half a percent of that (405B and 70B shapes, 8 to
40 unlike cards; `benchmarks/places.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

# Of all that is asked for, what arithmetic in floats may lose.
_ROUNDING = 1e-9
# Halvings of the range in which a rate is: 1e-9 of it is left.
_HALVINGS = 30
# Parts of the bound for which servers are laid in a line, until it reaches the end.
_PARTS = (1, 0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


class Moves(IntEnum):
    """How a server goes to other blocks."""

    NEVER = 0  # somebody has told it which to serve
    AWAY = 1  # it leaves those that it has, and then loads the others
    BESIDE = 2  # it serves those that it has in both places all the time


@dataclass(frozen=True, order=True)
class Place:
    """Blocks ``[start, end)`` on a server that passes ``rate`` tokens per second through them."""

    start: int
    end: int
    rate: float
    moves: Moves = Moves.AWAY

    @classmethod
    def announced(cls, start: int, end: int, throughput: float, moves: Moves) -> Place:
        """Of a server with this ``throughput``.

        That is of requests for half of the blocks, by Petals' definition, and favours small spans
        up to twofold: reckoning with it reached 0.91 of the optimum in the median instead of 0.94.
        """
        blocks = end - start
        return cls(start, end, throughput * (blocks + 1) / (2 * blocks), moves)

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def capacity(self) -> float:
        """Tokens per second through one block."""
        return self.rate * self.size

    def at(self, start: int) -> Place:
        """The same server with as many blocks from another one on."""
        return replace(self, start=start, end=start + self.size)


def held(places: Sequence[Place], blocks: int) -> list[int]:
    """How many servers each block has."""
    counts = [0] * blocks
    for place in places:
        for block in range(place.start, min(place.end, blocks)):
            counts[block] += 1
    return counts


def unmet(places: Sequence[Place], blocks: int, rate: float) -> list[float]:
    """What is missing at each block where so many tokens per second are to flow through all."""
    begins = sorted((place.start, place.end, place.capacity) for place in places)
    there: list[list[float]] = []
    following, missing = 0, [0.0] * blocks
    least = rate * _ROUNDING
    for block in range(blocks):
        while following < len(begins) and begins[following][0] <= block:
            heapq.heappush(there, [*begins[following][1:]])
            following += 1
        needed = rate
        while there and needed > least:
            first = there[0]
            if first[0] <= block or first[1] <= least:
                heapq.heappop(there)
                continue
            taken = min(needed, first[1])
            first[1] -= taken
            needed -= taken
        missing[block] = needed if needed > least else 0.0
    return missing


def throughput(places: Sequence[Place], blocks: int) -> float:
    """The most tokens per second that can flow through all blocks."""
    low, high = 0.0, sum(place.capacity for place in places) / blocks
    if not any(unmet(places, blocks, high)):
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if any(unmet(places, blocks, middle)):
            high = middle
        else:
            low = middle
    return low


def bound(places: Sequence[Place], blocks: int) -> float:
    """More tokens per second than this flow with no places of the same servers; 0: never whole."""
    if sum(min(place.size, blocks) for place in places if place.rate) < blocks:
        return 0.0

    def allowed(rate: float) -> bool:
        useful = sum(min(place.size, blocks, place.capacity / rate) for place in places)
        return useful >= blocks * (1 - _ROUNDING)

    low, high = 0.0, sum(place.capacity for place in places) / blocks
    if allowed(high):
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if allowed(middle):
            low = middle
        else:
            high = middle
    return low


def layouts(places: Sequence[Place], blocks: int) -> list[tuple[float, list[Place]]]:
    """Places of the same servers in a line, and what flows through them, the best first.

    They do not depend on where the servers are.
    """
    most = bound(places, blocks)
    if not most:
        return []
    # Who has no speed to spare for its memory comes first, or last, or the largest or fastest.
    orders: tuple[Callable[[Place], float], ...] = (
        lambda place: place.size - place.capacity / most,
        lambda place: -place.size,
        lambda place: -place.rate,
        lambda place: -place.capacity,
    )
    found: list[tuple[float, list[Place]]] = []
    for order in orders:
        line = sorted(places, key=lambda place: (order(place), place.size, place.rate))
        for part in _PARTS:
            laid = _in_a_line(line, blocks, part * most)
            if not any(unmet(laid, blocks, part * most)):
                mirrored = [place.at(blocks - place.end) for place in laid]
                flow = throughput(laid, blocks)
                found += [(flow, laid), (flow, mirrored)]
                break
    return sorted(found, key=lambda one: -one[0])


def _in_a_line(places: Sequence[Place], blocks: int, rate: float) -> list[Place]:
    """Each server where the first block is whose demand is not met by those before it."""
    left, laid = [rate] * blocks, []
    least = rate * _ROUNDING
    for place in places:
        first = next((block for block in range(blocks) if left[block] > least), blocks)
        laid.append(place.at(max(0, min(first, blocks - place.size))))
        capacity = place.capacity
        for block in range(laid[-1].start, min(laid[-1].end, blocks)):
            taken = min(capacity, left[block])
            left[block] -= taken
            capacity -= taken
    return laid
