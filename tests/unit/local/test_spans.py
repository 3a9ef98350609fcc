"""Which blocks the servers of a local swarm get."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm_notebook import LocalSwarm
from swarm_notebook.errors import ModelNotFound
from swarm_notebook.local.swarm import plan_spans


def test_blocks_are_split_evenly_or_as_given() -> None:
    assert plan_spans(30, 2) == [(0, 15), (15, 30)]
    assert plan_spans(5, 3) == [(0, 2), (2, 3), (3, 5)]
    assert plan_spans(4, [(0, 4), (2, 4)]) == [(0, 4), (2, 4)]


@pytest.mark.parametrize("servers", [0, 6, [], [(0, 6)], [(3, 3)], [(-1, 2)]])
def test_a_split_that_cannot_be_names_the_argument(servers: int | list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="servers"):
        plan_spans(5, servers)


def test_no_such_model_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="config"):
        LocalSwarm(tmp_path)
