"""How many tokens are guessed ahead."""

from __future__ import annotations

import pytest
import torch

from swarm_notebook.model.generation.drafting import MAX_GUESSES, DraftLength


def test_auto_guesses_more_where_passes_are_dear_and_guesses_right() -> None:
    def learned(first: float, further: float, right: float) -> int:
        length, passes = DraftLength(), torch.Generator().manual_seed(0)
        for _ in range(60):
            guessed = length.best()
            accepted = 0
            while accepted < guessed and float(torch.rand((), generator=passes)) < right:
                accepted += 1
            length.observe(guessed, accepted, first + further * guessed)
        return length.best()

    far, near = learned(0.15, 0.001, 0.9), learned(0.01, 0.008, 0.9)
    assert far > 2 * near
    assert learned(0.15, 0.001, 0.99) == MAX_GUESSES
    assert learned(0.15, 0.001, 0.1) <= 4
    assert learned(0.01, 0.01, 0.3) == 1


def test_what_a_pass_costs_is_learned() -> None:
    length = DraftLength()
    for guessed in [1, 8, 2, 16, 4, 8] * 5:
        length.observe(guessed, 0, 0.1 + 0.002 * guessed)
    first, further = length.cost()
    assert first == pytest.approx(0.1, rel=0.05)
    assert further == pytest.approx(0.002, rel=0.2)
