"""Petals' clients list the next servers with a step: each of ours pushes its output to the first.

Three servers in a row, and a client that speaks the wire to them as Petals' does: it opens its
sessions with a whole step each, and then lets the servers hand on what it sends to the first. All
is compared with the same blocks in this process.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.p2p import PeerID
from support.hosting import HostedSwarm
from support.raw_wire import RawClient, RawSession, request

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import protocol
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.rpc import fields

SPANS = [(0, 2), (2, 4), (4, 5)]
HIDDEN, QUIET_SECONDS = 48, 0.5
NOBODY = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


class Chain:
    """A session on each of the servers, and the blocks to compare with."""

    def __init__(self, client: RawClient, peers: list[str], span: Span):
        self.client, self.peers, self.span = client, peers, span
        self.ids = [str(uuid.uuid4()) for _ in SPANS]
        self.sessions: list[RawSession] = []

    def run(self, work: Any) -> Any:
        return self.client.run(work)

    def expected(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """What the first, the second and the third server are to answer."""
        found = []
        for start, end in SPANS:
            hidden = self.span.run(start, end, hidden)[0]
            found.append(hidden)
        return found

    async def open(self, hidden: torch.Tensor) -> None:
        """The first step, which goes to all of them."""
        for number, answer in enumerate([hidden, *self.expected(hidden)[:-1]]):
            peer = PeerID.from_base58(self.peers[number])
            self.sessions.append(await self.client.session(peer))
            await self.send(number, "first", answer, max_length=64)
            await self.sessions[number].receive()

    async def send(
        self,
        number: int,
        step: str,
        hidden: torch.Tensor,
        *slots: torch.Tensor | None,
        following: Any = None,
        **more: Any,
    ) -> None:
        slots = slots or (None, None)
        metadata = {
            "session_id": self.ids[number],
            "step_id": step,
            "points": 0.0,
            "args_structure": ((b"__T0", b"__T1", b"__T2"), {}),
            **more,
        }
        if following is not None:
            metadata["next_servers"] = following
        uid = protocol.uid_chain("tiny-llama", *SPANS[number])
        await self.sessions[number].stream.send(request(uid, hidden, *slots, **metadata))

    def following(self, number: int) -> list[tuple[str, str, int, int]]:
        """The servers behind this one, as Petals' clients list them."""
        rest = zip(self.peers, self.ids, SPANS, strict=True)
        return [(peer, session, *blocks) for peer, session, blocks in rest][number + 1 :]

    async def receive(self) -> list[torch.Tensor]:
        return [(await session.receive())[0] for session in self.sessions]

    async def silence(self, number: int) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(QUIET_SECONDS):
                await self.sessions[number].stream.receive()

    def close(self) -> None:
        for session in self.sessions:
            session.close()


@pytest.fixture(scope="module")
def swarm(tiny_llama: Path) -> Iterator[HostedSwarm]:
    with HostedSwarm(tiny_llama, SPANS, cache_tokens=1 << 15) as local:
        yield local


@pytest.fixture(scope="module")
def client(swarm: HostedSwarm) -> Iterator[RawClient]:
    raw = RawClient(swarm.initial_peers)
    yield raw
    raw.close()


@pytest.fixture(scope="module")
def span(tiny_llama: Path) -> Span:
    loaded = load_blocks(resolve(tiny_llama), 0, SPANS[-1][1], dtype=torch.float32)
    return Span(loaded.decoder, loaded.layers_name, 0)


@pytest.fixture
def chain(swarm: HostedSwarm, client: RawClient, span: Span) -> Iterator[Chain]:
    made = Chain(client, [str(server.peer_id) for server in swarm.servers], span)
    yield made
    made.close()


def random_states(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_step_goes_from_server_to_server(chain: Chain) -> None:
    """Only the first gets it from the client; what the client sends besides changes nothing."""
    states = random_states(2, 7)
    whole = chain.expected(states)

    async def main() -> None:
        await chain.open(states[:, :4])
        for position, step in ((4, "a"), (5, "b"), (6, "c")):
            now = slice(position, position + 1)
            await chain.send(0, step, states[:, now], following=chain.following(0))
            for got, expected in zip(await chain.receive(), whole, strict=True):
                same(got, expected[:, now])
            for number in (1, 2):
                inputs, rest = whole[number - 1][:, now], chain.following(number)
                await chain.send(number, step, inputs, following=rest)
        for number in range(3):
            await chain.silence(number)

    chain.run(main())


def test_the_rows_of_a_beam_search_go_along(chain: Chain) -> None:
    states, rows = random_states(3, 6), torch.tensor([2, 0, 0])

    async def main() -> None:
        await chain.open(states[:, :4])
        await chain.send(0, "a", states[:, 4:], None, rows, following=chain.following(0))
        selected = torch.cat([states[rows, :4], states[:, 4:]], dim=1)
        for got, expected in zip(await chain.receive(), chain.expected(selected), strict=True):
            same(got, expected[:, 4:])

    chain.run(main())


async def is_not_handed_on(chain: Chain, states: torch.Tensor, *slots: Any, **more: Any) -> None:
    """The second server waits for the client; the session of the first is as it should be."""
    await chain.open(states[:, :1])
    await chain.send(0, "a", states[:, 1:], *slots, **more)
    await chain.sessions[0].receive()
    await chain.silence(1)
    whole = chain.expected(states)
    await chain.send(1, "a", whole[0][:, 1:])
    (got,) = await chain.sessions[1].receive()
    same(got, whole[1][:, 1:])


def test_deep_prompts_are_each_servers_own(chain: Chain) -> None:
    prompts = torch.zeros(2, 1, 4, HIDDEN)
    more: dict[str, Any] = {"following": chain.following(0)}
    chain.run(is_not_handed_on(chain, random_states(1, 6), prompts, None, **more))


def test_what_no_unary_call_carries_is_not_sent(chain: Chain) -> None:
    states = random_states(100, 230)
    assert states.numel() * states.itemsize > protocol.MAX_UNARY_BYTES
    chain.run(is_not_handed_on(chain, states, following=chain.following(0)))


@pytest.mark.parametrize("peer", [NOBODY, "0", "Qm"])
def test_a_server_that_is_not_there_costs_the_client_nothing(chain: Chain, peer: str) -> None:
    following = [(peer, "session", 2, 4)]
    chain.run(is_not_handed_on(chain, random_states(1, 3), following=following))


GOOD = (NOBODY, "session", 2, 4)
WRONG: dict[str, tuple[Any, str]] = {
    "no list": ("x", "expected 1 to"),
    "a number": (7, "expected 1 to"),
    "many": ([GOOD] * (fields.MAX_SERVERS + 1), "expected 1 to"),
    "no server": ([7], "blocks from 2 on"),
    "too short": ([GOOD[:3]], "blocks from 2 on"),
    "no text": ([(7, "session", 2, 4)], "blocks from 2 on"),
    "empty": ([("", "session", 2, 4)], "blocks from 2 on"),
    "long": ([("Q" * 1000, "session", 2, 4)], "blocks from 2 on"),
    "no numbers": ([(NOBODY, "session", "2", 4)], "blocks from 2 on"),
    "a truth value": ([GOOD, (NOBODY, "session", 4, True)], "blocks from 4 on"),
    "a gap": ([(NOBODY, "session", 3, 4)], "blocks from 2 on"),
    "backwards": ([GOOD, (NOBODY, "session", 4, 4)], "blocks from 4 on"),
    "endless": ([(NOBODY, "session", 2, 1 << 40)], "blocks from 2 on"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_list_that_is_none_is_refused(chain: Chain, wrong: str) -> None:
    following, message = WRONG[wrong]

    async def main() -> None:
        await chain.open(random_states(1, 2))
        await chain.send(0, "a", random_states(1, 1), following=following)
        with pytest.raises(BadRequest, match=f"next_servers: .*{message}"):
            await chain.sessions[0].receive()

    chain.run(main())
