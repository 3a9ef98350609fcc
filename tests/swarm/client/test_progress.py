"""What is said of a long prompt, and of a server that takes long."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

import pytest
import torch
from support.pairs import TOLERANCE
from support.patience import PATIENCE, wait_until

from swarm_notebook.client import connection, watch
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


def test_a_server_that_takes_long_is_named_on_a_line_that_goes_away(
    tiny_scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "TELL_AFTER", 0.0)
    go_on, ids, seen = Event(), tiny_scene.ids(1, 5), [""]

    def named() -> bool:
        seen[0] += capsys.readouterr().err
        return "Waiting for server local-1" in seen[0]

    slow = tiny_scene.local.servers[1].layers[0]
    hook = slow.register_forward_pre_hook(lambda *_: go_on.wait(PATIENCE) and None)
    with ThreadPoolExecutor(1) as calls:
        answer = calls.submit(lambda: tiny_scene.remote(ids).logits)
        try:
            wait_until(named, "a line")
        finally:
            hook.remove()
            go_on.set()
    expected = tiny_scene.reference(ids).logits
    torch.testing.assert_close(answer.result(), expected, atol=TOLERANCE, rtol=0)
    assert capsys.readouterr().err.endswith("\r")  # the line is empty again
