"""The swarm map over real servers, beside the kernel's main thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.patience import wait_until

import swarm_notebook as sn
from swarm_notebook.widgets import SwarmMap

if TYPE_CHECKING:
    from support.scene import Scene

    from swarm_notebook.swarm import Swarm


@pytest.fixture
def own_swarm(tiny_scene: Scene, tiny_llama: Path) -> Iterator[Swarm]:
    """A notebook of the test's own: the shared one has seen what tests before did."""
    with sn.connect(tiny_scene.local.initial_peers, model=tiny_llama) as swarm:
        yield swarm


def test_the_map_follows_a_real_swarm_without_the_main_thread(
    tiny_scene: Scene, own_swarm: Swarm
) -> None:
    from support.scene import generate

    swarm = own_swarm
    shown = SwarmMap(swarm, selected="nobody")
    try:
        # This thread only sleeps or generates: what is seen, the map's own thread has done.
        assert shown.planned
        assert [part[1:] for part in shown.route] == [[0, 2], [2, 5]]
        assert [(row[1], row[2], row[3], row[4], row[14]) for row in shown.servers] == [
            ("local-0", 0, 2, "online", "0:2"),
            ("local-1", 2, 5, "online", "2:5"),
        ]
        assert shown.coverage == [[0, 5, 1]]
        generate(swarm.model, tiny_scene.ids(1, 9))
        wait_until(lambda: not shown.planned)
        assert shown.route == [[row[0], row[2], row[3]] for row in shown.servers]
        wait_until(lambda: shown.pace[0] == 9 + 13)
        assert shown.pace[1] > 0
        wait_until(lambda: len(shown.seen) == 2)
        assert {facts[0]: facts[1] for facts in shown.seen.values()}["local-1"] == "2:5"
        wait_until(lambda: shown.pace[1] == 0)
        assert shown.bill == swarm.bill().line
        read = shown.read
        time.sleep(1.1)
        shown.refresh()
        assert shown.read > read
        assert not shown.error
        assert repr(shown).startswith("<SwarmMap: tiny-llama, 2 servers online")
        assert "local-0" in shown.picture()
        assert "waiting" in shown.picture()
    finally:
        shown.close()


def test_all_that_has_passed_is_counted_once(tiny_scene: Scene, own_swarm: Swarm) -> None:
    """The map said "no tokens yet" beside a bill: of passes without a cache, and of what was before
    it; and counted tokens twice that a block at home divides.
    """
    swarm, ids = own_swarm, tiny_scene.ids(2, 9)
    model: Any = swarm.model
    model(ids)
    shown = SwarmMap(swarm)
    try:
        assert shown.pace[0] == 18
        model(ids)
        wait_until(lambda: shown.pace[0] == 36)
        assert shown.pace[1] > 0
        assert not shown.planned
        swarm.own([1])
        model(ids)
        wait_until(lambda: shown.pace[0] == 54)
        model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        wait_until(lambda: shown.pace[0] == 54 + 18 + 4)
        assert swarm.trace().shape.startswith("3 tokens in 3 passes")
        swarm.release()
        # A hook that changes a state: the rest of the blocks is asked once more.
        with swarm.model.model.layers[3].register_forward_hook(lambda *args: 2 * args[2]):
            model(ids)
        wait_until(lambda: shown.pace[0] == 76 + 18)
    finally:
        shown.close()


def test_blocks_at_home_have_a_row(tiny_scene: Scene) -> None:
    swarm = tiny_scene.swarm
    shown = SwarmMap(swarm)
    assert shown.home == []
    swarm.own([1, 2])
    try:
        wait_until(lambda: shown.home == [[1, 3]])
        assert shown.missing == []
        assert "in this notebook" in shown.headline
    finally:
        swarm.release()
    wait_until(lambda: shown.home == [])
    shown.close()


def test_an_unknown_argument_is_refused(tiny_scene: Scene) -> None:
    with pytest.raises(TypeError, match=r"SwarmMap\(\) has no argument height"):
        SwarmMap(tiny_scene.swarm, height=3)
