"""Servers that lie about what one has pushed to the other: found in that step, named and left."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import liars
from support.hosting import HostedServer, HostedSwarm
from support.patience import PATIENCE
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.client.request import Request
from swarm_notebook.client.session import pipeline
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.errors import ServerGone
from swarm_notebook.net.wire.hand_overs import Signed
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.server.rpc import session
from swarm_notebook.server.rpc.inbox import Inbox
from swarm_notebook.swarm import Swarm

LENGTH = 48
# At this rate hardly anything is replayed: a hand-over is not found by audits.
HARDLY = 1e-9


@pytest.fixture(scope="module")
def pairs(tiny_llama: Path) -> Iterator[HostedSwarm]:
    """Two servers of each half."""
    with HostedSwarm(tiny_llama, [(0, 2), (2, 5)] * 2) as swarm, swarm.with_a_node():
        yield swarm


@pytest.fixture
def swarm(pairs: HostedSwarm) -> Iterator[Swarm]:
    with sn.connect(pairs.initial_peers, model=pairs.model, verify=HARDLY) as swarm:
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
    """Two steps, of which the first one is long."""
    ids = torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    first = swarm.model(ids[:, :-1], use_cache=True)
    second = swarm.model(ids[:, -1:], past_key_values=first.past_key_values)
    with torch.no_grad():
        expected = local(ids).logits
    found = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def is_named(pairs: HostedSwarm, swarm: Swarm, liar: HostedServer) -> None:
    table = swarm.audit(wait=PATIENCE)
    assert table.wrong == (liar.peer_id,)
    (found,) = (one for one in table.verdicts if one.outcome == "wrong")
    assert found.by == ("what was signed",)
    assert liar not in two_of(pairs, swarm)
    row = next(row for row in swarm.status().servers if row.peer_id == liar.peer_id)
    assert row.state == "found wrong"
    assert "by what was signed" in row.note


def in_the_first_value(states: torch.Tensor) -> torch.Tensor:
    """As small a change as there is."""
    flat = states.view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(float("inf")))
    return states


def some_of(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Other states in one of so many hand-overs, the first one included."""
    calls = itertools.count()
    return lambda states: states.roll(1, -1) if next(calls) % count == 0 else states


# Who of the two lies, and how.
LIES: dict[str, tuple[int, Callable[[HostedServer], AbstractContextManager[None]]]] = {
    "hands over others": (0, lambda it: liars.handing_over(it, lambda x: x.roll(1, -1))),
    "hands over almost the same": (0, lambda it: liars.handing_over(it, in_the_first_value)),
    "once": (0, lambda it: liars.handing_over(it, some_of(1 << 30))),
    "says it got others": (1, lambda it: liars.misprinting(it, lambda found: found ^ 1)),
    "does not say": (1, lambda it: liars.misprinting(it, lambda _: None)),
}


@pytest.mark.parametrize("lie", LIES)
def test_who_lies_about_a_hand_over_is_named_and_left(
    pairs: HostedSwarm, swarm: Swarm, local: Any, lie: str
) -> None:
    place, lying = LIES[lie]
    liar = two_of(pairs, swarm)[place]
    with lying(liar):
        is_right(swarm, local)
        is_named(pairs, swarm, liar)


def test_who_tells_the_notebook_others_than_it_hands_over_is_named(
    pairs: HostedSwarm, swarm: Swarm, local: Any
) -> None:
    """Nothing of what it has told stays in what comes back."""
    sender, _ = two_of(pairs, swarm)
    with ExitStack() as lie:
        lie.enter_context(liars.lying(sender, liars.LIES["2 % too long"]))
        lie.enter_context(liars.handing_over(sender, lambda states: states / 1.02))
        is_right(swarm, local)
        is_named(pairs, swarm, sender)


def test_it_is_found_without_audits(pairs: HostedSwarm, local: Any) -> None:
    with sn.connect(pairs.initial_peers, model=pairs.model, verify="off") as swarm:
        sender, _ = two_of(pairs, swarm)
        with liars.handing_over(sender, some_of(1 << 30)):
            is_right(swarm, local)
        assert sender not in two_of(pairs, swarm)


def test_nobody_is_blamed_with_what_somebody_else_has_signed(
    pairs: HostedSwarm, swarm: Swarm, local: Any
) -> None:
    """The receiver says that it got others, and shows an altered proof."""
    _, receiver = two_of(pairs, swarm)

    def altered(found: Signed | None) -> Signed | None:
        return None if found is None else replace(found, digest=bytes(len(found.digest)))

    with ExitStack() as lie:
        lie.enter_context(liars.misprinting(receiver, lambda found: found ^ 1))
        lie.enter_context(liars.showing(altered))
        is_right(swarm, local)
        is_named(pairs, swarm, receiver)


def test_nobody_is_blamed_if_the_receiver_can_show_nothing_any_more(
    pairs: HostedSwarm, swarm: Swarm, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stay open, and the notebook carries between them, where nobody can lie."""
    sender, receiver = two_of(pairs, swarm)

    async def gone(_self: Hop, _request: Request, _step_id: str) -> Signed | None:
        raise ServerGone("the server is gone")

    monkeypatch.setattr(Hop, "proof", gone)
    with liars.handing_over(sender, lambda states: states.roll(1, -1)):
        is_right(swarm, local)
        is_right(swarm, local)
        table = swarm.audit(wait=PATIENCE)
    assert not table.wrong
    assert [one.peer for one in table.verdicts if one.outcome == "open"] == [
        sender.peer_id,
        receiver.peer_id,
    ]


@pytest.mark.parametrize("signature", [b"", bytes(64)])
def test_what_is_not_signed_is_not_computed_with(
    pairs: HostedSwarm, swarm: Swarm, local: Any, signature: bytes
) -> None:
    """It goes over the notebook, which blames nobody."""
    sender, _ = two_of(pairs, swarm)
    with (
        liars.signing(sender, signature),
        liars.handing_over(sender, lambda states: states.roll(1, -1)),
    ):
        is_right(swarm, local)
        assert not swarm.audit(wait=PATIENCE).wrong


def test_a_lie_in_a_part_of_a_long_prompt_spoils_nothing(
    pairs: HostedSwarm, swarm: Swarm, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MIN_PART_TOKENS", "MAX_PART_TOKENS"):
        monkeypatch.setattr(pipeline, name, 8)
    calls = iter(range(100))

    def in_the_second(states: torch.Tensor) -> torch.Tensor:
        return states * 1.5 if next(calls) == 1 else states

    sender, _ = two_of(pairs, swarm)
    with liars.handing_over(sender, in_the_second):
        is_right(swarm, local)
    assert next(calls) > 2  # several parts were pushed
    is_named(pairs, swarm, sender)


@pytest.mark.parametrize("compression", ["float16", "int8"])
def test_honest_servers_say_the_same_of_what_is_compressed(
    pairs: HostedSwarm, compression: str
) -> None:
    options: dict[str, Any] = {"compression": compression, "verify": HARDLY}
    with sn.connect(pairs.initial_peers, model=pairs.model, **options) as swarm:
        ids = torch.randint(3, 128, (1, LENGTH))
        swarm.model.generate(ids, max_new_tokens=3, do_sample=False)
        assert not swarm.audit(wait=PATIENCE).wrong


def test_what_the_notebook_did_not_send_has_not_come_from_it(
    pairs: HostedSwarm, swarm: Swarm, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, receiver = two_of(pairs, swarm)

    class Filled(Inbox):
        async def get(self) -> tuple[PackedMessage, int]:
            found = await super().get()
            # It was announced as pushed.
            self.filled = self._pushes is receiver.handler._pushes and bool(self._known)
            return found

    monkeypatch.setattr(session, "Inbox", Filled)
    is_right(swarm, local)
    is_named(pairs, swarm, receiver)
