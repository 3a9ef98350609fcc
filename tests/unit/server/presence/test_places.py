"""Where servers go by themselves, against the best that there is."""

from __future__ import annotations

import itertools
import random

import pytest

from swarm_notebook.server.presence.places import Place, better, choose, value


def settled(machines: list[tuple[int, float]], blocks: int, seed: int) -> list[Place]:
    """Servers that come one after the other, and move until none wants to."""
    places: list[Place] = []
    for size, rate in machines:
        start, end = choose(places, blocks, size, rate)
        places.append(Place(start, end, rate))
    drawn = random.Random(seed)
    for _ in range(100):
        order = list(range(len(places)))
        drawn.shuffle(order)
        for index in order:
            others = [place for other, place in enumerate(places) if other != index]
            span = better(others, blocks, places[index])
            if span is not None:
                whole = value(places, blocks).covered == blocks
                moved = value([*others, Place(*span, places[index].rate)], blocks)
                assert moved.covered == blocks or not whole
                places[index] = Place(*span, places[index].rate)
                break
        else:
            return places
    pytest.fail("they never settle")


def optimum(machines: list[tuple[int, float]], blocks: int) -> tuple[int, float]:
    """The most blocks that can be covered, and then the most through the narrowest."""
    starts = [range(blocks - min(size, blocks) + 1) for size, _ in machines]
    return max(
        (found.covered, found.narrowest)
        for chosen in itertools.product(*starts)
        for found in [
            value(
                [
                    Place(start, min(start + size, blocks), rate)
                    for start, (size, rate) in zip(chosen, machines, strict=True)
                ],
                blocks,
            )
        ]
    )


def test_they_come_near_the_best_places_on_small_swarms() -> None:
    drawn, reached = random.Random(5), []
    for seed in range(60):
        blocks = drawn.randint(4, 8)
        machines = [
            (drawn.randint(1, blocks), float(drawn.choice([50, 100, 200, 400])))
            for _ in range(drawn.randint(1, 4))
        ]
        found = value(settled(machines, blocks, seed), blocks)
        covered, narrowest = optimum(machines, blocks)
        reached.append((found.covered / covered, found.narrowest / narrowest))
    assert min(share for share, _ in reached) == 1.0
    full = sorted(rate for share, rate in reached if share == 1.0)
    assert full[len(full) // 2] >= 0.9


def test_equal_machines_cover_all_and_then_spread() -> None:
    places: list[Place] = []
    for _ in range(4):
        places.append(Place(*choose(places, 12, 3, 100.0), 100.0))
    assert sorted((place.start, place.end) for place in places) == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert choose(places[:2] + places[3:], 12, 3, 1.0) == (6, 9)
    # A fifth goes where the rate is least.
    slow = [Place(0, 3, 40.0), *places[1:]]
    assert choose(slow, 12, 3, 100.0) == (0, 3)


def test_nobody_uncovers_a_block_or_moves_for_little() -> None:
    own = Place(0, 3, 100.0)
    assert better([Place(3, 6, 10.0)], 6, own) is None, "it is the only one there"
    twice = [Place(0, 3, 100.0), Place(3, 6, 100.0)]
    assert better(twice, 6, own) is None, "it is as good where it is"
    assert better([Place(0, 3, 100.0)], 6, own) == (3, 6), "somebody has left"
    assert better([Place(0, 3, 100.0), Place(3, 6, 20.0)], 6, own) == (3, 6)
    assert better([Place(0, 3, 100.0), Place(3, 6, 90.0)], 6, own) is None


def test_several_move_one_after_the_other_where_no_single_move_helps() -> None:
    # There is room for all, but the hole is at one end and what is held twice at the other.
    places = [Place(0, 4, 100.0), Place(2, 6, 100.0), Place(6, 9, 100.0), Place(9, 11, 100.0)]
    moved = []
    for _ in range(8):
        for index, own in enumerate(places):
            others = [place for other, place in enumerate(places) if other != index]
            if (span := better(others, 12, own)) is not None:
                places[index] = Place(*span, own.rate)
                moved.append(index)
                break
    assert value(places, 12).covered == 12
    assert 1 < len(moved) <= 4


def test_a_stream_needs_few_hops() -> None:
    # All the same otherwise: a span that follows another one is better than one across two.
    assert choose([Place(0, 4, 100.0), Place(4, 8, 100.0)], 8, 4, 100.0) in {(0, 4), (4, 8)}
    assert choose([], 8, 20, 1.0) == (0, 8)
