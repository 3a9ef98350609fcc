"""Which blocks a server takes when nobody has told it, and when it had better move: pure decisions.

A swarm that nobody coordinates: each server reads what the others announce and takes the span that
lifts the swarm most. First come blocks that nobody has. Then the narrowest place: of a chain, the
blocks with the least throughput decide how many tokens pass at all. Petals' servers maximise the
same by blocks, the least first [1]. Then the number of hops that one stream needs, as each costs.

A move costs the blocks their server for as long as it loads, so it must be worth it, and no block
may lose its last server by it.

[1] https://arxiv.org/abs/2312.08361, section 3.3 and appendix
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Petals' servers move when the narrowest place is a third better (a ``balance_quality`` of 0.75).
WORTH_MOVING = 4 / 3


@dataclass(frozen=True)
class Place:
    """Blocks ``[start, end)`` on a server that passes ``rate`` tokens per second through them."""

    start: int
    end: int
    rate: float


@dataclass(frozen=True, order=True)
class Value:
    """What a swarm is worth; the larger one is better.

    Attributes:
        covered: blocks that somebody has.
        narrowest: tokens per second through the narrowest of them.
        hops: minus the servers that a stream through all covered blocks needs.
        rates: tokens per second through each block, the least first.
    """

    covered: int
    narrowest: float
    hops: int
    rates: tuple[float, ...]


def value(places: Sequence[Place], blocks: int) -> Value:
    """What a swarm of servers is worth for a model of so many blocks."""
    rates = [0.0] * blocks
    held = [False] * blocks
    for place in places:
        for block in range(place.start, min(place.end, blocks)):
            rates[block] += place.rate
            held[block] = True
    counted = sorted(rate for rate, has in zip(rates, held, strict=True) if has)
    narrowest = counted[0] if counted else 0.0
    return Value(len(counted), narrowest, -_hops(places, held), tuple(counted))


def choose(others: Sequence[Place], blocks: int, size: int, rate: float) -> tuple[int, int]:
    """The span ``(start, end)`` of ``size`` blocks with which a swarm is worth most.

    Args:
        others: the servers that are there.
        blocks: how many the model has.
        size: how many this server can hold, at least one.
        rate: tokens per second that it passes through a span of them.
    """
    size = min(size, blocks)
    places = [Place(start, start + size, rate) for start in range(blocks - size + 1)]
    best = max(places, key=lambda place: (value([*others, place], blocks), -place.start))
    return best.start, best.end


def better(others: Sequence[Place], blocks: int, own: Place) -> tuple[int, int] | None:
    """Where a server had better be than where it is; None if it should stay.

    Args:
        others: the servers that are there besides it, and can be reckoned with.
        own: where it is.
    """
    covered = [False] * blocks
    for place in others:
        covered[place.start : place.end] = [True] * (min(place.end, blocks) - place.start)
    if not all(covered[own.start : own.end]):
        return None
    start, end = choose(others, blocks, own.end - own.start, own.rate)
    now = value([*others, own], blocks)
    then = value([*others, Place(start, end, own.rate)], blocks)
    gains = then.covered > now.covered or (
        then.covered == now.covered and then.narrowest > WORTH_MOVING * now.narrowest
    )
    return (start, end) if gains else None


def _hops(places: Sequence[Place], held: Sequence[bool]) -> int:
    """The fewest servers that a stream through all held blocks takes."""
    hops, block = 0, 0
    while block < len(held):
        if not held[block]:
            block += 1
            continue
        block = max(place.end for place in places if place.start <= block < place.end)
        hops += 1
    return hops
