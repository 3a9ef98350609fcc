"""Liars who know of audits: in league, only to the new, as witnesses; and servers of Petals."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import liars
from support.hosting import HostedSwarm
from support.patience import PATIENCE
from support.petals_peer import petals_swarm

import swarm_notebook as sn
from swarm_notebook.swarm import Swarm

TOKENS = 48
# Enough for what is drawn with a chance of one in eight not to come out once in 10,000 runs.
MANY = 70


def connected(local: HostedSwarm, **options: Any) -> Swarm:
    return sn.connect(local.initial_peers, model=local.model, **options)


def ask(swarm: Swarm, seed: int = 0, length: int = TOKENS) -> None:
    ids = torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))
    swarm.model(ids, use_cache=False)


def wrong(swarm: Swarm) -> tuple[str, ...]:
    return swarm.audit(wait=PATIENCE).wrong


def test_two_that_vouch_for_each_other_are_found_here(trio: HostedSwarm) -> None:
    """They are two of three: by votes, the honest one would be left."""
    with connected(trio, verify=1.0, verify_here=True) as swarm:
        first = trio.next_of(swarm)
        second, honest = (server for server in trio.servers if server is not first)
        lie = liars.LIES["2 % too long"]
        with liars.lying(first, lie), liars.lying(second, lie):
            for seed in range(MANY):
                ask(swarm, seed)
                if first.peer_id in wrong(swarm):
                    break
            for seed in range(MANY):
                if trio.next_of(swarm) is honest:
                    break
                ask(swarm, seed)
                wrong(swarm)
            found = set(wrong(swarm))
            assert first.peer_id in found
            assert honest.peer_id not in found
            assert trio.next_of(swarm) is honest or second.peer_id in found


def test_who_lies_to_new_notebooks_only_is_found_while_it_does(trio: HostedSwarm) -> None:
    """At the default rate: the first 128 tokens of a server are audited."""
    answered: list[int] = []

    def while_new(states: torch.Tensor) -> torch.Tensor:
        answered.append(states.shape[1])
        return states * 1.02 if sum(answered) <= 150 else states

    with connected(trio, verify="spot") as swarm:
        liar = trio.next_of(swarm)
        with liars.lying(liar, liars.outputs(while_new)):
            ask(swarm, length=140)
            assert wrong(swarm) == (liar.peer_id,)


def test_witnesses_that_refuse_hide_nobody(trio: HostedSwarm) -> None:
    def refuse(_states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no audits here")

    with connected(trio, verify=1.0, verify_here=True) as swarm:
        liar = trio.next_of(swarm)
        refusing, other = (server for server in trio.servers if server is not liar)
        with (
            liars.lying(refusing, liars.outputs(refuse)),
            liars.lying(other, liars.outputs(refuse)),
            liars.lying(liar, liars.LIES["2 % too long"]),
        ):
            ask(swarm)
            table = swarm.audit(wait=PATIENCE)
        assert table.wrong == (liar.peer_id,)
        assert table.verdicts[0].by == ("this notebook",)


def test_slow_witnesses_delay_no_token(trio: HostedSwarm) -> None:
    going_on = threading.Event()

    def wait(states: torch.Tensor) -> torch.Tensor:
        going_on.wait(PATIENCE)
        return states

    with connected(trio, verify=1.0) as swarm:
        used = trio.next_of(swarm)
        first, second = (server for server in trio.servers if server is not used)
        with liars.lying(first, liars.outputs(wait)), liars.lying(second, liars.outputs(wait)):
            for seed in range(3):
                ask(swarm, seed)
            assert not swarm.audit().verdicts  # all has come back, and nobody has said a word
            going_on.set()
            verdicts = swarm.audit(wait=PATIENCE).verdicts
        assert [one.outcome for one in verdicts] == ["agreed"] * 3


@pytest.mark.parametrize("cached", [False, True])
def test_servers_of_petals_are_audited(tiny_llama: Path, cached: bool) -> None:
    """They print nothing, and cannot replay; the notebook does."""
    ids = torch.randint(3, 128, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with (
        petals_swarm(tiny_llama, [(0, 2), (2, 5)]) as (peers, servers),
        sn.connect(peers, model=tiny_llama, verify=1.0, verify_here=True) as swarm,
    ):
        swarm.model(ids, use_cache=cached)
        assert {one.outcome for one in swarm.audit(wait=PATIENCE).verdicts} == {"agreed"}
        liar: Any = SimpleNamespace(layers=list(servers[1]._span.layers))
        with liars.lying(liar, liars.LIES["a skipped block"]):
            swarm.model(ids, use_cache=cached)
            table = swarm.audit(wait=PATIENCE)
        assert [(one.start, one.end) for one in table.verdicts if one.outcome == "wrong"] == [
            (2, 5)
        ]
