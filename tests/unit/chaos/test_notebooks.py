"""The chaos run's own judgement of greedy generations: tokens and logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chaos.notebooks import same_text

PROMPT = 1
CLEAR, CLOSE = [1.0, 2.0, 3.0], [3.0, 3.0000005, 1.0]


def generation(tokens: list[int], *logits: list[float]) -> Any:
    return SimpleNamespace(
        sequences=torch.tensor([[7, *tokens]]), logits=[torch.tensor([each]) for each in logits]
    )


LOCAL = generation([2, 1], CLEAR, CLOSE)


def test_taken_as_equal() -> None:
    same_text(LOCAL, LOCAL, PROMPT)


@pytest.mark.parametrize(
    "remote",
    [
        pytest.param(generation([1, 1], CLEAR, CLOSE), id="another token"),
        pytest.param(generation([2, 0], CLEAR, [3.0000005, 3.0, 1.0]), id="another at a tie"),
        pytest.param(generation([2, 1], CLEAR, [3.0, 3.001, 1.0]), id="other logits"),
        pytest.param(generation([2], CLEAR), id="too short"),
        pytest.param(generation([2, 1, 0], CLEAR, CLOSE, CLEAR), id="too long"),
    ],
)
def test_told_apart(remote: Any) -> None:
    with pytest.raises(AssertionError):
        same_text(remote, LOCAL, PROMPT)
