"""The serve panel and the `Lending` behind it, with a real server process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from support.patience import PATIENCE, wait_until

import swarm_notebook as sn
from swarm_notebook.errors import BlocksOutOfRange, ServerStartError
from swarm_notebook.local.process import ANY_INTERFACE, ANY_PORT
from swarm_notebook.widgets import ServePanel

if TYPE_CHECKING:
    from support.scene import Scene


@pytest.fixture
def panel(tiny_llama: Path) -> Iterator[ServePanel]:
    """In a swarm of its own: in the tests' one it would be remembered for minutes."""
    made = ServePanel(tiny_llama, memory="1GB", threads=1, name="lent", listen=ANY_PORT)
    yield made
    made.close()


def test_lend_look_and_stop(panel: ServePanel, tiny_llama: Path) -> None:
    from support.scene import generate

    assert (panel.title, panel.num_blocks, panel.state) == ("tiny-llama", 5, "stopped")
    assert repr(panel) == "<ServePanel: blocks 0:5 of tiny-llama>"
    panel.begin()
    panel.begin()
    wait_until(lambda: panel.state == "serving")
    assert (panel.start, panel.end) == (0, 5)  # all that the server has chosen
    assert "0:5 of 5: the swarm needs them most" in panel.lending.log_tail(100)
    assert "ServerStartError" in panel.error  # the second start
    assert panel.weights[0] == panel.weights[1] > 100_000
    assert all("/127.0.0.1/" in address for address in panel.addresses)
    wait_until(lambda: panel.facts)
    assert panel.facts["tokens_served"] == 0
    with sn.connect(panel.addresses, model=tiny_llama) as guest:
        assert [hop.name for hop in guest.route().hops] == ["lent"]
        generate(guest.model, torch.ones(2, 10, dtype=torch.long))
        wait_until(lambda: panel.facts.get("tokens_served") == 2 * (10 + 13))
        assert panel.facts["requests_served"] == 14
        assert panel.facts["sessions_served"] == 1
        assert "46" in panel.picture()
    before = panel.lending.pid
    assert before is not None
    panel.stop()
    assert panel.state == "stopping"
    wait_until(lambda: panel.state == "stopped")
    assert panel.facts == {}
    assert panel.lending.pid is None


def test_a_server_that_dies_is_told_of_with_its_log(tiny_llama: Path) -> None:
    lending = sn.Lending(tiny_llama, (0, 2), initial_peers=["/ip4/127.0.0.1/tcp/1/p2p/QmNope"])
    panel = ServePanel(lending=lending)
    try:
        panel.begin()
        wait_until(lambda: panel.state == "failed")
        assert "stopped unexpectedly" in panel.error
        assert "QmNope" in panel.log
    finally:
        panel.close()
    assert lending.state == "stopped"


def test_in_an_attached_swarm_it_joins_where_that_is(tiny_scene: Scene) -> None:
    lending = sn.Lending(swarm=tiny_scene.swarm)
    assert (lending.model, lending.blocks) == (tiny_scene.swarm.name, (0, 5))
    assert lending._peers == sorted(tiny_scene.swarm.initial_peers) != []
    assert lending._listen == ANY_PORT


def test_blocks_and_where_to_listen_are_chosen_sensibly(tiny_llama: Path) -> None:
    lending = sn.Lending(tiny_llama)
    assert lending.blocks == (0, 5)
    assert lending._listen == ANY_INTERFACE
    lending.blocks = (2, 3)
    assert repr(lending) == "<Lending blocks 2:3 of tiny-llama: stopped>"
    with pytest.raises(BlocksOutOfRange, match=r"blocks: 3:9, but .* has blocks 0:5"):
        lending.blocks = (3, 9)
    assert sn.Lending(tiny_llama, initial_peers=["/ip4/127.0.0.1/tcp/1/p2p/Q"])._listen == ANY_PORT
    near = ["/ip4/127.0.0.1/tcp/1/p2p/Q"]
    assert sn.Lending(tiny_llama, initial_peers=near, lan=True)._listen == ANY_INTERFACE
    far = ["/ip4/127.0.0.1/tcp/1/p2p/Q", "/ip4/10.0.0.2/tcp/1/p2p/Q"]
    assert sn.Lending(tiny_llama, initial_peers=far)._listen == ANY_INTERFACE
    assert issubclass(BlocksOutOfRange, ValueError)
    assert issubclass(ServerStartError, RuntimeError)
    with pytest.raises(TypeError, match="colour"):
        ServePanel(tiny_llama, colour="red")


def test_a_look_that_takes_long_does_not_undo_a_button(
    panel: ServePanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, looked = threading.Event(), threading.Event()
    stopping, stopped = threading.Event(), threading.Event()

    def facts() -> None:
        looking.set()
        assert looked.wait(PATIENCE)

    def stop() -> None:
        stopping.set()
        assert stopped.wait(PATIENCE)

    monkeypatch.setattr(panel.lending, "facts", facts)
    monkeypatch.setattr(panel.lending, "stop", stop)
    assert looking.wait(PATIENCE)
    panel.stop()
    looked.set()
    assert stopping.wait(PATIENCE)  # so that look is over
    assert panel.state == "stopping"
    stopped.set()
    wait_until(lambda: panel.state == "stopped")
