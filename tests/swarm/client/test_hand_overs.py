"""Servers that lie about what one has pushed to the other: nothing that comes of it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import liars
from support.hosting import HostedSwarm
from support.patience import PATIENCE
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.client.session import pipeline
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.server.rpc import session
from swarm_notebook.server.rpc.inbox import Inbox
from swarm_notebook.swarm import Swarm

LENGTH = 48


@pytest.fixture(scope="module")
def chain(tiny_llama: Path) -> Iterator[HostedSwarm]:
    """Three servers, each of which hands on to the next."""
    with HostedSwarm(tiny_llama, [(0, 2), (2, 4), (4, 5)]) as swarm, swarm.with_a_node():
        yield swarm


@pytest.fixture(scope="module")
def local(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture
def swarm(chain: HostedSwarm) -> Iterator[Swarm]:
    # At this rate hardly anything is replayed: a hand-over is not found by audits.
    with sn.connect(chain.initial_peers, model=chain.model, verify=1e-9) as swarm:
        yield swarm


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(0))


def two_steps_are_right(swarm: Swarm, local: Any) -> None:
    first = swarm.model(ids()[:, :-1], use_cache=True)
    second = swarm.model(ids()[:, -1:], past_key_values=first.past_key_values)
    with torch.no_grad():
        expected = local(ids()).logits
    found = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def in_the_first_value(states: torch.Tensor) -> torch.Tensor:
    """As small a change as there is."""
    flat = states.view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(float("inf")))
    return states


def disputes(swarm: Swarm) -> list[tuple[str, str]]:
    """Name of the server, and what its verdict is; those of audits are left out."""
    verdicts = swarm.audit(wait=PATIENCE).verdicts
    return [(one.name, one.outcome) for one in verdicts if "one of them lies" in one.why]


LIES: dict[str, Callable[[HostedSwarm], AbstractContextManager[None]]] = {
    "hands over others": lambda it: liars.handing_over(it.servers[0], lambda x: x.roll(1, -1)),
    "hands over almost the same": lambda it: liars.handing_over(it.servers[0], in_the_first_value),
    "says it got others": lambda it: liars.misprinting(it.servers[1], lambda found: found ^ 1),
    "does not say": lambda it: liars.misprinting(it.servers[1], lambda _: None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_at_a_border_names_both_sides_and_spoils_nothing(
    chain: HostedSwarm, swarm: Swarm, local: Any, lie: str
) -> None:
    with LIES[lie](chain):
        two_steps_are_right(swarm, local)
        assert disputes(swarm) == [("local-0", "open"), ("local-1", "open")]
        # From now on the notebook carries between them, where nobody can lie.
        two_steps_are_right(swarm, local)
        assert len(disputes(swarm)) == 2
    assert not swarm.audit().wrong


def test_a_lie_in_a_part_of_a_long_prompt_spoils_nothing(
    chain: HostedSwarm, swarm: Swarm, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MIN_PART_TOKENS", "MAX_PART_TOKENS"):
        monkeypatch.setattr(pipeline, name, 8)
    calls = iter(range(100))

    def in_the_second(states: torch.Tensor) -> torch.Tensor:
        return states * 1.5 if next(calls) == 1 else states

    with liars.handing_over(chain.servers[0], in_the_second):
        two_steps_are_right(swarm, local)
    assert next(calls) > 4  # so many parts were pushed
    assert disputes(swarm) == [("local-0", "open"), ("local-1", "open")]


@pytest.mark.parametrize("compression", ["float16", "int8"])
def test_honest_servers_say_the_same_of_what_is_compressed(
    chain: HostedSwarm, compression: str
) -> None:
    options: dict[str, Any] = {"compression": compression, "verify": 1e-9}
    with sn.connect(chain.initial_peers, model=chain.model, **options) as swarm:
        swarm.model.generate(ids(), max_new_tokens=3, do_sample=False)
        assert not disputes(swarm)


def test_what_the_notebook_did_not_send_has_not_come_from_it(
    tiny_llama: Path, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two servers, as of three the one that has both borders would be found and left."""

    class AllFilled(Inbox):
        async def get(self) -> tuple[PackedMessage, int]:
            found = await super().get()
            self.filled = bool(self._known)  # it was announced as pushed
            return found

    monkeypatch.setattr(session, "Inbox", AllFilled)
    with (
        HostedSwarm(tiny_llama, [(0, 2), (2, 5)]) as servers,
        sn.connect(servers.initial_peers, model=tiny_llama, verify=1e-9) as swarm,
    ):
        two_steps_are_right(swarm, local)
        assert disputes(swarm) == [("local-0", "open"), ("local-1", "open")]
