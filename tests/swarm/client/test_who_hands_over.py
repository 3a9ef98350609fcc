"""Who lies about a hand-over is found where there are others to try both with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support import liars
from support.hosting import HostedServer, HostedSwarm
from support.patience import PATIENCE
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.swarm import Swarm

LENGTH = 48


@pytest.fixture(scope="module")
def pairs(tiny_llama: Path) -> Iterator[HostedSwarm]:
    """Two servers of each half."""
    with HostedSwarm(tiny_llama, [(0, 2), (2, 5)] * 2) as swarm, swarm.with_a_node():
        yield swarm


@pytest.fixture
def swarm(pairs: HostedSwarm) -> Iterator[Swarm]:
    # At this rate hardly anything is replayed: a hand-over is not found by audits.
    with sn.connect(pairs.initial_peers, model=pairs.model, verify=1e-9) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def local(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def two_of(pairs: HostedSwarm, swarm: Swarm) -> tuple[HostedServer, HostedServer]:
    """The servers of the route, sender and receiver."""
    by_peer = {server.peer_id: server for server in pairs.servers}
    sender, receiver = (by_peer[hop.peer_id] for hop in swarm.route().hops)
    return sender, receiver


def is_right(swarm: Swarm, local: Any) -> None:
    ids = torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    first = swarm.model(ids[:, :-1], use_cache=True)
    second = swarm.model(ids[:, -1:], past_key_values=first.past_key_values)
    with torch.no_grad():
        expected = local(ids).logits
    found = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def some_of(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Other states in one of so many hand-overs, the first one included."""
    calls = itertools.count()
    return lambda states: states.roll(1, -1) if next(calls) % count == 0 else states


# Who of the two lies, and how.
LIES: dict[str, tuple[int, Callable[[HostedServer], AbstractContextManager[None]]]] = {
    "hands over others": (0, lambda it: liars.handing_over(it, lambda x: x.roll(1, -1))),
    "now and then": (0, lambda it: liars.handing_over(it, some_of(3))),
    "says it got others": (1, lambda it: liars.misprinting(it, lambda found: found ^ 1)),
    "does not say": (1, lambda it: liars.misprinting(it, lambda _: None)),
}


@pytest.mark.parametrize("lie", LIES)
def test_who_lies_is_named_and_left(pairs: HostedSwarm, swarm: Swarm, local: Any, lie: str) -> None:
    place, lying = LIES[lie]
    both = two_of(pairs, swarm)
    liar, other = both[place], both[1 - place]
    with lying(liar):
        is_right(swarm, local)
        table = swarm.audit(wait=PATIENCE)
    assert table.wrong == (liar.peer_id,)
    (found,) = (one for one in table.verdicts if one.outcome == "wrong")
    assert other.name in found.by
    assert len(found.by) == 2
    assert swarm.route().hops[place].peer_id != liar.peer_id


def test_who_tells_the_notebook_others_than_it_hands_over_is_named(pairs: HostedSwarm) -> None:
    """By an audit of what it told, which proves it."""
    options: dict[str, Any] = {"verify": 1e-9, "verify_here": True}
    with sn.connect(pairs.initial_peers, model=pairs.model, **options) as swarm, ExitStack() as lie:
        sender, _ = two_of(pairs, swarm)
        lie.enter_context(liars.lying(sender, liars.LIES["2 % too long"]))
        lie.enter_context(liars.handing_over(sender, lambda states: states / 1.02))
        swarm.model(torch.arange(3, 3 + LENGTH)[None], use_cache=True)
        table = swarm.audit(wait=PATIENCE)
    assert table.wrong == (sender.peer_id,)
    found = next(one for one in table.verdicts if one.outcome == "wrong")
    assert "mean error" in found.why
    assert found.proof is not None


def test_who_lies_once_stays_unnamed(pairs: HostedSwarm, swarm: Swarm, local: Any) -> None:
    """Nobody is blamed for what may have been either; nothing of it is used."""
    sender, receiver = two_of(pairs, swarm)
    with liars.handing_over(sender, some_of(1 << 30)):
        is_right(swarm, local)
        table = swarm.audit(wait=PATIENCE)
    assert not table.wrong
    open_ = [one.peer for one in table.verdicts if one.outcome == "open"]
    assert sorted(open_) == sorted([sender.peer_id, receiver.peer_id])
