"""The knapsack against all possibilities."""

from __future__ import annotations

import itertools
import random

from swarm_notebook.server.engine.quantising.allocation import Choice, allocate


def test_the_least_loss_within_the_budget() -> None:
    draw = random.Random(0)
    for _ in range(50):
        items = [
            [Choice(draw.randint(1, 40), draw.random()) for _ in range(3)]
            for _ in range(draw.randint(1, 5))
        ]
        budget = draw.randint(5, 150)
        possible = [
            sum(choice.loss for choice in picked)
            for picked in itertools.product(*items)
            if sum(choice.size for choice in picked) <= budget
        ]
        found = allocate(items, budget)
        if not possible:
            assert found is None
            continue
        assert found is not None
        chosen = [row[index] for row, index in zip(items, found, strict=True)]
        assert sum(choice.size for choice in chosen) <= budget
        assert sum(choice.loss for choice in chosen) == min(possible)


def test_a_budget_is_never_exceeded() -> None:
    items = [[Choice(3.7, 1.0), Choice(7.3, 0.5), Choice(11.9, 0.1)] for _ in range(40)]
    for budget in (160.1, 200, 333.3, 480):
        found = allocate(items, budget)
        assert found is not None
        assert sum(row[index].size for row, index in zip(items, found, strict=True)) <= budget
    assert allocate(items, 147) is None
