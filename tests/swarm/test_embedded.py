"""Embedded swarms: they end with whatever held them, and what still holds one is told of."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import pytest
from support.patience import wait_until
from support.processes import marked_processes
from support.scene import Scene

import swarm_notebook as sn


def test_an_earlier_embedded_swarm_ends_or_is_told_of(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``swarm = sn.connect()`` once more left its servers, 650 MB each, running in silence."""
    before = marked_processes().keys()
    with caplog.at_level(logging.WARNING):
        swarm = sn.connect(model=tiny_llama)
        model = swarm.model
        first = marked_processes().keys() - before
        assert first
        swarm = sn.connect(model=tiny_llama)
        wait_until(lambda: "an earlier embedded swarm is still running" in caplog.text)
        assert "a variable, such as model, still refers to it" in caplog.text
        assert first <= marked_processes().keys()
        caplog.clear()
        del model
        gc.collect()
        wait_until(lambda: not first & marked_processes().keys())
    assert swarm.connected
    swarm.disconnect()
    assert not caplog.text


def test_a_swarm_says_what_it_is(tiny_scene: Scene) -> None:
    assert repr(tiny_scene.swarm) == "<Swarm of 2 servers: tiny-llama>"
