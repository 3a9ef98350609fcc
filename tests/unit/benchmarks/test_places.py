"""Servers that choose their places come near the optimum, and do no worse than others rules."""

from __future__ import annotations

import statistics

import pytest
from places import RULES, Server, compare, flow, optimum

KINDS = [Server(2, 100.0), Server(3, 300.0), Server(5, 250.0), Server(8, 800.0)]
BLOCKS = 12


def test_the_optimum_is_that_of_a_swarm_that_one_can_reckon() -> None:
    # Two halves, one of them twice: what the slower half passes is all that passes.
    servers = {number: Server(6, 600.0) for number in range(3)}
    spans = {0: (0, 6), 1: (6, 12), 2: (6, 12)}
    assert flow(servers, spans, BLOCKS) == pytest.approx(100.0)
    # Better: the third between the two others, so that each of them has less to do.
    assert flow(servers, {**spans, 2: (3, 9)}, BLOCKS) == pytest.approx(150.0)
    assert optimum(servers, BLOCKS, 10.0) == pytest.approx(150.0, rel=0.01)
    assert flow(servers, {0: (0, 6), 1: (0, 6), 2: (5, 11)}, BLOCKS) == pytest.approx(0.0)


def test_they_reach_nine_tenths_and_as_much_as_others() -> None:
    parts: dict[str, list[float]] = {name: [] for name in RULES}
    for seed in range(6):
        for name, (found, moves) in compare(seed, BLOCKS, KINDS, 6, 10.0, every=3).items():
            parts[name] += found
            assert name != "ours" or moves < 30, "they oscillate"
    medians = {name: statistics.median(found) for name, found in parts.items()}
    assert medians["ours"] >= 0.9, medians
    assert medians["ours"] >= max(medians.values()) - 1e-6, medians
    found = sorted(parts["ours"])
    assert found[len(found) // 10] >= 0.8, found
    # Where each has a block of its own, nobody may go, whatever the others could have then.
    assert found[0] > 0.5, found
