"""What a long prompt's progress says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swarm_notebook.client import connection
from swarm_notebook.progress import Waiting

if TYPE_CHECKING:
    from support.scene import Scene


def test_a_long_prompt_counts_the_blocks_that_it_has_passed(
    tiny_scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    class Recorded(Waiting):
        def __exit__(self, *error: object) -> None:
            shown.append((self._what, self._total, self._count()))
            super().__exit__(*error)

    monkeypatch.setattr(connection, "Waiting", Recorded)
    monkeypatch.setattr(connection, "LONG_PASS", 100)
    tiny_scene.remote.generate(tiny_scene.ids(2, 230), max_new_tokens=2, min_new_tokens=2)
    assert shown == [("Reading 230 tokens", 5, 5)]
