"""Where servers go by themselves, against the best that there is."""

from __future__ import annotations

import itertools
import random

import pytest

from swarm_notebook.server.presence.flow import Moves, Place, bound, held, layouts, throughput
from swarm_notebook.server.presence.places import better, choose, next_move


def covered(places: list[Place], blocks: int) -> int:
    return sum(map(bool, held(places, blocks)))


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
                moved = [*others, Place(*span, places[index].rate)]
                assert covered(moved, blocks) == blocks or covered(places, blocks) < blocks
                places[index] = Place(*span, places[index].rate)
                break
        else:
            return places
    pytest.fail("they never settle")


def optimum(machines: list[tuple[int, float]], blocks: int) -> tuple[int, float]:
    """The most blocks that can be covered, and then the most through the narrowest."""
    starts = [range(blocks - min(size, blocks) + 1) for size, _ in machines]
    return max(
        (covered(places, blocks), throughput(places, blocks))
        for chosen in itertools.product(*starts)
        for places in [
            [
                Place(start, min(start + size, blocks), rate)
                for start, (size, rate) in zip(chosen, machines, strict=True)
            ]
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
        found = settled(machines, blocks, seed)
        most, flow = optimum(machines, blocks)
        assert flow <= bound(found, blocks) * (1 + 1e-6)
        reached.append((covered(found, blocks) / most, throughput(found, blocks) / (flow or 1.0)))
    assert min(share for share, _ in reached) == 1.0
    full = sorted(rate for _, rate in reached if rate)
    assert full[len(full) // 2] >= 0.95
    assert full[0] >= 0.8, full[:3]


def test_what_flows_is_what_a_network_of_all_servers_carries() -> None:
    halves = [Place(0, 6, 100.0), Place(6, 12, 100.0)]
    # The third between the two others: each of them has less to do.
    assert throughput([*halves, Place(3, 9, 100.0)], 12) == pytest.approx(150.0)
    assert throughput([*halves, Place(6, 12, 100.0)], 12) == pytest.approx(100.0)
    assert bound([*halves, halves[0]], 12) == pytest.approx(150.0)
    assert throughput(halves[:1], 12) == bound(halves[:1], 12) == 0.0
    assert layouts(halves[:1], 12) == []
    # What is fast and small is of use for what it holds, and no more.
    assert bound([Place(0, 11, 100.0), Place(11, 12, 1e6)], 12) == pytest.approx(100.0)


def test_equal_machines_cover_all_and_then_spread() -> None:
    places: list[Place] = []
    for _ in range(4):
        places.append(Place(*choose(places, 12, 3, 100.0), 100.0))
    assert sorted((place.start, place.end) for place in places) == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert choose(places[:2] + places[3:], 12, 3, 1.0) == (6, 9)
    # A fifth goes where the rate is least, so that the slow one has only one block to itself.
    slow = [Place(0, 3, 40.0), *places[1:]]
    assert choose(slow, 12, 3, 100.0) == (1, 4)


def test_nobody_uncovers_a_block_or_moves_for_little() -> None:
    own = Place(0, 3, 100.0)
    assert better([Place(3, 6, 10.0)], 6, own) is None, "it is the only one there"
    assert better([Place(2, 5, 100.0), Place(3, 6, 100.0)], 6, own) is None, "it is as good there"
    assert better([own, Place(3, 6, 100.0)], 6, own) == (2, 5), "between the two others"
    assert better([Place(0, 3, 100.0)], 6, own) == (3, 6), "somebody has left"
    assert better([Place(0, 3, 100.0), Place(3, 6, 20.0)], 6, own) == (3, 6)
    assert better([Place(0, 3, 100.0), Place(3, 6, 198.0)], 6, own) is None


def test_who_has_room_for_both_keeps_to_the_blocks_that_nobody_else_has() -> None:
    others = [Place(0, 1, 100.0), Place(3, 5, 75.0)]
    assert better(others, 5, Place(0, 3, 67.0)) is None, "it is the only one at two of its blocks"
    # It serves these two all the time, as they are in both places.
    own = Place(0, 3, 67.0, Moves.BESIDE)
    assert better(others, 5, own) == (1, 4)
    assert better(others[1:], 5, own) is None, "now it is the only one at all of them"


def test_who_was_told_which_blocks_to_serve_is_not_expected_to_move() -> None:
    own, other = Place(0, 3, 100.0), Place(0, 3, 100.0, Moves.NEVER)
    assert better([other], 6, own) == (3, 6)
    assert better([own], 6, other) is None


def test_it_is_one_servers_turn_whoever_asks() -> None:
    places = [Place(0, 3, 100.0 + number) for number in range(4)]
    move = next_move(places, 6)
    assert move is not None
    wanted = [
        span
        for index, own in enumerate(places)
        if (span := better([*places[:index], *places[index + 1 :]], 6, own)) is not None
    ]
    assert wanted == [(move[1].start, move[1].end)]


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
    assert covered(places, 12) == 12
    assert 1 < len(moved) <= 4


def test_the_narrowest_place_is_helped_where_several_are_narrow() -> None:
    # No move brings all to what they could have; one that is needed nowhere helps where least is.
    places = [
        Place(start, end, rate / (end - start))
        for start, end, rate in (
            (0, 10, 31.7),
            (0, 21, 40.5),
            (19, 29, 18.6),
            (29, 39, 43.2),
            (39, 75, 258.8),
            (70, 80, 43.2),
        )
    ]
    before = throughput(places, 80)
    move = next_move(places, 80)
    assert move is not None
    assert move[0] == places[0]
    assert throughput([*places[1:], move[1]], 80) > 1.1 * before


def test_who_makes_a_swarm_whole_ties_nobody_to_a_poor_place() -> None:
    """Five cards lack the last blocks; there, the sixth would leave each a block of its own."""
    sizes = [(0, 10, 18579.0), (10, 20, 18579.0), (20, 30, 31663.0), (30, 40, 31663.0)]
    sizes.append((40, 61, 40508.0))
    places = [Place(start, end, capacity / (end - start)) for start, end, capacity in sizes]
    rate = 81644.0 / 36
    last = [*places, Place(44, 80, rate)]
    assert next_move(last, 80) is None
    assert throughput(last, 80) < 0.75 * bound(last, 80)
    places.append(Place(*choose(places, 80, 36, rate), rate))
    missing = 0
    while (move := next_move(places, 80)) is not None:
        missing += covered(places, 80) < 80
        places.remove(move[0])
        places.append(move[1])
    assert missing <= 3
    assert throughput(places, 80) > 0.9 * bound(places, 80)


def test_a_stream_needs_few_hops() -> None:
    # All the same otherwise: a span that follows another one is better than one across two.
    pairs = [Place(start, start + 2, 100.0) for start in (0, 2, 4, 6)]
    assert choose(pairs, 8, 4, 1e-6) in {(0, 4), (2, 6), (4, 8)}
    assert choose([], 8, 20, 1.0) == (0, 8)
