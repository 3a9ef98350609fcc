"""A session that begins with a copy of another one's cache, on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosting import HostedServer, HostedSwarm
from support.raw_wire import RawClient, RawSession

from swarm_notebook.errors import BadRequest, CacheFull, SessionLost
from swarm_notebook.net.wire import protocol

START, END, HIDDEN = 1, 4, 48
UID = protocol.uid_chain("tiny-llama", START, END)
CACHE_TOKENS = 512  # for three sessions of two rows, which do not wait for each other


class Bench:
    """A server, and a client of it."""

    def __init__(self, server: HostedServer, client: RawClient):
        self.server, self.client = server, client

    def session(self, client: RawClient | None = None) -> RawSession:
        client = client or self.client
        return client.run(client.session(self.server.peer))

    def step(
        self, session: RawSession, hidden: torch.Tensor, position: int, step_id: str, **more: Any
    ) -> torch.Tensor:
        mask = more.pop("mask", None)
        slots = [hidden, None, None, mask] if mask is not None else [hidden]
        named = {"start_from_position": position, "step_id": step_id, "max_length": 64}
        (found,) = self.client.run(session.step(UID, *slots, **named, **more))
        return found


@pytest.fixture(scope="module")
def bench(tiny_llama: Path) -> Iterator[Bench]:
    with HostedSwarm(tiny_llama, [(START, END)], cache_tokens=CACHE_TOKENS) as swarm:
        client = RawClient(swarm.initial_peers)
        yield Bench(swarm.servers[0], client)
        client.close()


def states(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def padding(length: int) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.uint8)
    mask[1, :3] = 0
    return mask


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("position", [9, 6])
def test_it_goes_on_as_the_other_would(bench: Bench, padded: bool, position: int) -> None:
    hidden, new, rest = states(9), states(4, seed=1), states(5, seed=2)
    mask = padding(9) if padded else None
    one, other, whole = bench.session(), bench.session(), bench.session()
    bench.step(
        one, hidden[:, :7], 0, "1", session_id="one", mask=mask if mask is None else mask[:, :7]
    )
    bench.step(one, hidden[:, 7:], 7, "2")
    copied = bench.step(other, new, position, "3", session_id="other", copy_of=["one", "2"])
    # What was copied from goes on, too.
    went_on = bench.step(one, rest, 9, "4")
    further = bench.step(other, rest, position + 4, "5")
    bench.step(
        whole, hidden[:, :position], 0, "6", mask=mask if mask is None else mask[:, :position]
    )
    close(copied, bench.step(whole, new, position, "7"))
    close(further, bench.step(whole, rest, position + 4, "8"))
    if position < 9:
        bench.step(whole, hidden[:, position:], position, "9")
    close(went_on, bench.step(whole, rest, 9, "10"))
    for session in (one, other, whole):
        session.close()


@pytest.mark.parametrize(
    ("named", "error", "told"),
    [
        (["one", "0"], SessionLost, "ended or gone on"),
        (["two", "1"], SessionLost, "ended or gone on"),
        (["other", "9"], SessionLost, "ended or gone on"),
        ("one", BadRequest, "copy_of.*a session id and a step id"),
        (["one", 1], BadRequest, "copy_of.*a session id and a step id"),
        (["one", "x" * 999], BadRequest, "copy_of"),
    ],
)
def test_what_is_no_session_to_copy(bench: Bench, named: Any, error: type, told: str) -> None:
    one, other = bench.session(), bench.session()
    bench.step(one, states(5), 0, "1", session_id="one")
    with pytest.raises(error, match=told):
        bench.step(other, states(1), 5, "9", session_id="other", copy_of=named)
    bench.step(one, states(1), 5, "2")  # it is none the worse for it
    one.close()


def test_more_than_it_holds_or_no_place(bench: Bench) -> None:
    one = bench.session()
    bench.step(one, states(5), 0, "1", session_id="one")
    with pytest.raises(SessionLost, match="ended or gone on"):
        bench.step(bench.session(), states(1), 6, "2", copy_of=["one", "1"])
    other = bench.session()
    step = other.step(UID, states(1), copy_of=["one", "1"], max_length=64)
    with pytest.raises(BadRequest, match="needs a start_from_position"):
        bench.client.run(step)
    one.close()


def test_another_ones_session_is_not_copied(bench: Bench) -> None:
    one = bench.session()
    bench.step(one, states(5), 0, "1", session_id="one")
    stranger = RawClient(bench.server.addresses)
    session = stranger.run(stranger.session(bench.server.peer))
    named = {"start_from_position": 5, "max_length": 64, "copy_of": ["one", "1"]}
    with pytest.raises(SessionLost, match="ended or gone on"):
        stranger.run(session.step(UID, states(1), **named))
    stranger.close()
    one.close()


def test_a_copy_takes_room_of_its_own(bench: Bench) -> None:
    one = bench.session()
    bench.step(one, states(200), 0, "1", session_id="one")
    with pytest.raises(CacheFull):
        bench.step(bench.session(), states(1), 200, "2", copy_of=["one", "1"], alloc_timeout=0.1)
    bench.step(one, states(1), 200, "3")
    one.close()
