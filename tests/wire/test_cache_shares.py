"""One peer holds all of a server's cache, with steps in flight all the time; another one comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hivemind.p2p import PeerID
from support.hosting import HostedSwarm
from support.patience import PATIENCE
from support.raw_wire import RawClient, RawSession, request

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import CacheFull, SessionLost
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire import protocol
from swarm_notebook.net.wire.opening import open_stream
from swarm_notebook.server.engine.span import Span

START, END, HIDDEN = 1, 4, 48
UID = protocol.uid_chain("tiny-llama", START, END)
# A session takes a page of 64 positions for each of its rows.
ROWS, LENGTH, COUNT = 4, 56, 8
CACHE_TOKENS = COUNT * ROWS * 64


class Greedy:
    """Sessions of one peer that fill the cache, each with its next step there before an answer.

    Attributes:
        lost: how many of them have ended because others needed their memory.
    """

    def __init__(self, client: RawClient, server: PeerID):
        self._client, self._server = client, server
        self._steps, self.lost = [0] * COUNT, 0

    async def work(self) -> None:
        """Until it is cancelled, or all of them have ended."""
        await asyncio.gather(*map(self._one, range(COUNT)))

    async def go_on(self) -> None:
        """Return when each that is there has made some more steps."""
        wanted, deadline = [steps + 3 for steps in self._steps], time.monotonic() + PATIENCE
        while sum(map(int.__lt__, self._steps, wanted)) > self.lost:
            assert time.monotonic() < deadline, f"{self._steps} steps, {wanted} wanted"
            await asyncio.sleep(0.01)

    async def _one(self, number: int) -> None:
        session = await self._client.session(self._server)
        try:
            with pytest.raises(SessionLost, match="beyond its client's share"):
                await self._use(session, number)
            self.lost += 1
        finally:
            session.close()

    async def _use(self, session: RawSession, number: int) -> None:
        token = request(UID, states(1)[:, :1], start_from_position=LENGTH - 1)
        await session.step(UID, states(0))
        await session.stream.send(token)
        while True:
            await session.stream.send(token)
            await session.receive()
            self._steps[number] += 1


def states(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def server(tiny_llama: Path) -> Iterator[tuple[RawClient, PeerID]]:
    with (
        HostedSwarm(tiny_llama, [(START, END)], cache_tokens=CACHE_TOKENS) as swarm,
        closing(RawClient(swarm.initial_peers)) as client,
    ):
        yield client, swarm.servers[0].peer


def test_who_holds_all_gives_others_their_share_and_keeps_its_own(
    server: tuple[RawClient, PeerID], tiny_llama: Path
) -> None:
    """With steps in flight or not; whoever has its share already waits as ever."""
    client, peer = server
    loaded = load_blocks(resolve(tiny_llama), START, END, dtype=torch.float32)
    expected = Span(loaded.decoder, loaded.layers_name, START).run(START, END, states(2))[0]

    async def work() -> None:
        greedy = Greedy(client, peer)
        working = asyncio.create_task(greedy.work())
        newcomer = await Node.start([str(each) for each in client.node._initial_peers], client=True)
        try:
            await greedy.go_on()
            assert (await client.info(peer))["cache_tokens_free"] == 0
            opened: list[RawSession] = []
            for number in range(1, COUNT // 2 + 1):
                stream = await open_stream(newcomer.p2p, peer, protocol.RPC_INFERENCE)
                opened.append(RawSession(stream))
                (got,) = await opened[-1].step(UID, states(2), alloc_timeout=0.0)
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
                await greedy.go_on()
                assert greedy.lost == number
            stream = await open_stream(newcomer.p2p, peer, protocol.RPC_INFERENCE)
            with pytest.raises(CacheFull, match=f"0 of {CACHE_TOKENS} are free"):
                await RawSession(stream).step(UID, states(2), alloc_timeout=0.5)
            await greedy.go_on()
            assert greedy.lost == COUNT // 2
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await newcomer.stop()

    client.run(work())
