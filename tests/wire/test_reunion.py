"""Parts of a swarm that have lost each other, or have never met, become one."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hosting import HostedServer
from support.patience import wait_until

import swarm_notebook as sn
from swarm_notebook.server.options import ServeOptions
from swarm_notebook.server.presence import reunion


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reunion, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(reunion, "TOGETHER_SECONDS", 0.0)


def test_a_server_that_was_lost_is_called_again(tiny_llama: Path) -> None:
    with (
        HostedServer(ServeOptions(tiny_llama, (0, 2))) as first,
        HostedServer(ServeOptions(tiny_llama, (2, 5), first.addresses)) as second,
    ):
        # The first was told no address of the second: it has seen where that is.
        wait_until(lambda: first.remembers(second))
        first.lose(second)
        second.lose(first)
        wait_until(lambda: second.peer_id in first.acquaintances())
        wait_until(lambda: first.peer_id in second.acquaintances())
        with sn.connect(first.addresses, model=tiny_llama) as swarm:
            wait_until(lambda: not swarm.status().missing)


def test_who_goes_on_in_another_place_calls_those_that_were_lost_before(tiny_llama: Path) -> None:
    with (
        HostedServer(ServeOptions(tiny_llama, (0, 2))) as first,
        HostedServer(ServeOptions(tiny_llama, (2, 5), first.addresses)) as second,
    ):
        wait_until(lambda: second.remembers(first))
        known = second._server._reunion.remembered
        # Nobody that it could join at its start is there, as while a network is cut.
        with HostedServer(ServeOptions(tiny_llama, (2, 5)), known) as another:
            wait_until(lambda: first.peer_id in another.acquaintances())


def test_two_that_began_apart_meet_when_one_hears_of_the_other(tiny_llama: Path) -> None:
    with (
        HostedServer(ServeOptions(tiny_llama, (0, 2))) as first,
        HostedServer(ServeOptions(tiny_llama, (2, 5))) as second,
    ):
        assert first.acquaintances() == {}
        second.hear_of(first)
        with sn.connect(first.addresses, model=tiny_llama) as swarm:
            wait_until(lambda: not swarm.status().missing)
