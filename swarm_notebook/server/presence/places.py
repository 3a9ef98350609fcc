"""Which blocks a server takes when nobody has told it, and when it had better move: pure decisions.

A swarm that nobody coordinates: each server reads what the others announce and takes the span that
lifts the swarm most. First come blocks that nobody has. Then the narrowest place: of a chain, the
blocks with the least throughput decide how many tokens pass at all. Petals' servers maximise the
same by blocks, the least first [1]. Then the number of hops that one stream needs, as each costs.

A move costs the blocks their server for as long as it loads, so it must be worth it, and no block
of a swarm that is whole may lose its last server by it. Sometimes no single move helps: the room is
there, but between the wrong neighbours. Then all reckon with the same arrangement, which depends on
nothing but what the servers can hold and how fast they are, and go there one after the other.

`benchmarks/places.py` compares this with the optimum, and with what others do.

[1] https://arxiv.org/abs/2312.08361, section 3.3 and appendix
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# How much wider the narrowest place must become for one server to move, and for several to move one
# after the other. At 30 moments of six traces with up to 16 unlike servers, in parts of the optimum
# (median, worst tenth): 0.94 and 0.82; with Petals' third for one and no moves of several, 0.96 and
# 0.71 where there was a model at all, but twice there was none.
WORTH_MOVING, WORTH_MOVING_ALL = 1.2, 1.5


@dataclass(frozen=True, order=True)
class Place:
    """Blocks ``[start, end)`` on a server that passes ``rate`` tokens per second through them."""

    start: int
    end: int
    rate: float

    @classmethod
    def announced(cls, start: int, end: int, throughput: float) -> Place:
        """Of a server with this ``throughput``.

        That is of requests for half of the blocks, by Petals' definition, and favours small spans
        up to twofold: reckoning with it reached 0.91 of the optimum in the median instead of 0.94.
        """
        blocks = end - start
        return cls(start, end, throughput * (blocks + 1) / (2 * blocks))


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
    rates: list[float | None] = [None] * blocks
    for place in others:
        for block in range(place.start, min(place.end, blocks)):
            rates[block] = (rates[block] or 0.0) + place.rate
    # What decides first is had without the rest, for which there is a place or two to compare.
    first = [_covered_and_narrowest(rates, start, size, rate) for start in range(blocks - size + 1)]
    places = [
        Place(start, start + size, rate) for start, one in enumerate(first) if one == max(first)
    ]
    best = max(places, key=lambda place: (value([*others, place], blocks), -place.start))
    return best.start, best.end


def better(others: Sequence[Place], blocks: int, own: Place) -> tuple[int, int] | None:
    """Where a server had better be than where it is; None if it should stay.

    Args:
        others: the servers that are there besides it, and can be reckoned with.
        own: where it is.
    """
    places = sorted([*others, own])
    now = value(places, blocks)
    if _replaceable(own, places, blocks):
        start, end = choose(others, blocks, own.end - own.start, own.rate)
        alone = value([*others, Place(start, end, own.rate)], blocks)
        if _gains(alone, now, WORTH_MOVING):
            return start, end
    return _next_of_all(places, blocks, own, now)


def arrange(places: Sequence[Place], blocks: int) -> list[Place]:
    """Where the same servers would be if they had come one after the other, the largest first.

    It does not depend on where they are.
    """
    chosen: list[Place] = []
    for place in sorted(places, key=lambda one: (one.start - one.end, -one.rate)):
        span = choose(chosen, blocks, place.end - place.start, place.rate)
        chosen.append(Place(*span, place.rate))
    return chosen


def _next_of_all(
    places: Sequence[Place], blocks: int, own: Place, now: Value
) -> tuple[int, int] | None:
    """Where a server goes on the way to a better arrangement of all, if it is its turn."""
    whole = now.covered == blocks
    # No arrangement has more than what all of them pass through all blocks.
    most = sum(place.rate * (place.end - place.start) for place in places) / blocks
    if whole and most <= WORTH_MOVING_ALL * now.narrowest:
        return None
    wanted = arrange(places, blocks)
    if not _gains(value(wanted, blocks), now, WORTH_MOVING_ALL):
        return None
    staying = []
    for place in places:
        if place in wanted:
            wanted.remove(place)
            staying.append(place)
    moving = [place for place in places if place not in staying]
    for place in moving:
        if whole and not _replaceable(place, places, blocks):
            continue
        if place != own:
            return None
        alike = (place.end - place.start, place.rate)
        there = min(one for one in wanted if (one.end - one.start, one.rate) == alike)
        return there.start, there.end
    return None


def _gains(then: Value, now: Value, worth: float) -> bool:
    return then.covered > now.covered or (
        then.covered == now.covered and then.narrowest > worth * now.narrowest
    )


def _replaceable(place: Place, places: Sequence[Place], blocks: int) -> bool:
    """Whether each block of a place has another server, too."""
    held = [0] * blocks
    for one in places:
        for block in range(one.start, min(one.end, blocks)):
            held[block] += 1
    return all(count > 1 for count in held[place.start : place.end])


def _covered_and_narrowest(
    rates: Sequence[float | None], start: int, size: int, rate: float
) -> tuple[int, float]:
    """The first two of `Value` with one more server there."""
    inside = [(known or 0.0) + rate for known in rates[start : start + size]]
    outside = [known for known in (*rates[:start], *rates[start + size :]) if known is not None]
    return len(inside) + len(outside), min([*inside, *outside])


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
