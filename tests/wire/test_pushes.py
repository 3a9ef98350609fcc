"""States pushed into a session by another peer: taken from the announced one alone, in bounds."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hivemind.p2p import P2PHandlerError
from support.bench import Bench
from support.patience import PATIENCE
from support.raw_wire import RawClient, RawSession, request

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import protocol, streams, tensors
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.net.wire.opening import open_stream
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.rpc import inbox
from swarm_notebook.server.rpc.push import EARLY_BYTES_PER_PEER

HIDDEN = 48
QUIET_SECONDS = 0.3


class Pushes:
    """A session of one peer, and the streams over which others push."""

    def __init__(self, bench: Bench, span: Span, stranger: RawClient):
        self.bench, self.client, self.stranger = bench, bench.client, stranger
        self.span = span
        self.uid = protocol.uid_chain("tiny-llama", bench.start, bench.end)
        self.me = bench.client.node.peer_id.to_base58()
        self.id = str(uuid.uuid4())

    def expected(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.span.run(self.bench.start, self.bench.end, hidden)[0]

    async def open(self) -> RawSession:
        return await self.client.session(self.bench.server.peer)

    async def announce(
        self, session: RawSession, step: str, position: int = 0, sender: str = ""
    ) -> None:
        fields = {"session_id": self.id, "step_id": step, "start_from_position": position}
        fields |= {"max_length": 64, "push_from": sender or self.me}
        await session.stream.send(request(self.uid, None, None, None, **fields))

    async def stream(self, client: RawClient | None = None) -> streams.Stream:
        node = (client or self.client).node
        return await open_stream(node.p2p, self.bench.server.peer, protocol.RPC_PUSH_STREAM)

    def push(self, hidden: torch.Tensor, step: str) -> PackedMessage:
        metadata = protocol.pack_metadata({"session_id": self.id, "step_id": step})
        return PackedMessage(tensors=[tensors.pack(hidden)], metadata=metadata)

    async def silence(self, session: RawSession) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(QUIET_SECONDS):
                await session.stream.receive()


@pytest.fixture(scope="module")
def stranger(llama: Bench) -> Iterator[RawClient]:
    """A third peer; it has a loop of its own."""
    client = RawClient(llama.server.facts["maddrs"])
    yield client
    client.close()


@pytest.fixture(scope="module")
def span(llama: Bench) -> Span:
    """The server's blocks, here."""
    loaded = load_blocks(resolve(llama.folder), llama.start, llama.end, dtype=torch.float32)
    return Span(loaded.decoder, loaded.layers_name, llama.start)


@pytest.fixture
def pushes(llama: Bench, span: Span, stranger: RawClient) -> Pushes:
    return Pushes(llama, span, stranger)


def hidden(length: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("order", ["push last", "push first", "client instead", "both"])
def test_a_step_gets_its_states(pushes: Pushes, order: str) -> None:
    states, later = hidden(), hidden(1, 1)

    async def main() -> None:
        session, stream = await pushes.open(), await pushes.stream()
        if order == "push first":
            await stream.send(pushes.push(states, "a"))
            await asyncio.sleep(QUIET_SECONDS)
        await pushes.announce(session, "a")
        if order in ("client instead", "both"):
            fields = {"session_id": pushes.id, "step_id": "a", "start_from_position": 0}
            await session.stream.send(request("", states, None, None, **fields))
        if order in ("push last", "both"):
            await stream.send(pushes.push(states, "a"))
        (got,) = await session.receive()
        torch.testing.assert_close(got, pushes.expected(states), atol=1e-4, rtol=0)
        # The session goes on, and what came twice has been counted once.
        fields = {"session_id": pushes.id, "step_id": "b", "start_from_position": 3}
        (got,) = await session.step("", later, None, None, **fields)
        whole = pushes.expected(torch.cat([states, later], dim=1))
        torch.testing.assert_close(got, whole[:, 3:], atol=1e-4, rtol=0)
        session.close()
        stream.abort()

    pushes.client.run(main())


def test_steps_keep_their_order_whatever_comes_first(pushes: Pushes) -> None:
    states = hidden(6)

    async def main() -> None:
        session, stream = await pushes.open(), await pushes.stream()
        for number in range(3):
            await pushes.announce(session, str(number), 2 * number)
        for number in (2, 0, 1):
            piece = states[:, 2 * number : 2 * number + 2]
            await stream.send(pushes.push(piece, str(number)))
        got = torch.cat([(await session.receive())[0] for _ in range(3)], dim=1)
        torch.testing.assert_close(got, pushes.expected(states), atol=1e-4, rtol=0)
        session.close()
        stream.abort()

    pushes.client.run(main())


def test_what_the_client_sends_too_late_is_not_computed_again(pushes: Pushes) -> None:
    """Not even when other steps came in between."""
    states, later = hidden(6), hidden(1, 1)

    async def main() -> None:
        session, stream = await pushes.open(), await pushes.stream()
        for position, step in ((0, "a"), (3, "b")):
            await pushes.announce(session, step, position)
            await stream.send(pushes.push(states[:, position : position + 3], step))
        for _ in range(2):
            await session.receive()
        fields = {"session_id": pushes.id, "step_id": "a", "start_from_position": 0}
        await session.stream.send(request(pushes.uid, states[:, :3], None, None, **fields))
        fields |= {"step_id": "c", "start_from_position": 6}
        (got,) = await session.step("", later, None, None, **fields)
        whole = pushes.expected(torch.cat([states, later], dim=1))
        torch.testing.assert_close(got, whole[:, 6:], atol=1e-4, rtol=0)
        session.close()
        stream.abort()

    pushes.client.run(main())


@pytest.mark.parametrize("pushed", [False, True])
def test_a_client_gives_up_what_it_has_announced(pushes: Pushes, pushed: bool) -> None:
    """Each such step is answered; the cache is as it was, and a push that was there is dropped."""
    states, mask = hidden(8), torch.ones(1, 3, dtype=torch.uint8)

    async def main() -> None:
        session, stream = await pushes.open(), await pushes.stream()
        fields = {"session_id": pushes.id, "max_length": 64}
        (first,) = await session.step(
            pushes.uid, states[:, :2], None, None, step_id="a", start_from_position=0, **fields
        )
        for step, position in (("b", 2), ("c", 5)):
            fields |= {"step_id": step, "start_from_position": position, "push_from": pushes.me}
            await session.stream.send(request("", None, None, None, mask, **fields))
        if pushed:
            await stream.send(pushes.push(states[:, 5:], "c"))
            await asyncio.sleep(QUIET_SECONDS)
        for step in ("c", "b"):
            fields = {"session_id": pushes.id, "step_id": step, "start_from_position": 2}
            await session.stream.send(request(pushes.uid, states[:, :0], None, None, **fields))
        for _ in range(2):
            (nothing,) = await session.receive()
            assert nothing.shape == (1, 0, HIDDEN)
        fields = {"session_id": pushes.id, "step_id": "d", "start_from_position": 2}
        (got,) = await session.step("", states[:, 2:], None, None, **fields)
        whole = torch.cat([first, got], dim=1)
        torch.testing.assert_close(whole, pushes.expected(states), atol=1e-4, rtol=0)
        session.close()
        stream.abort()

    pushes.client.run(main())


@pytest.mark.parametrize("early", [False, True])
def test_nobody_but_the_announced_peer_is_heard(pushes: Pushes, early: bool) -> None:
    async def intrude() -> str:
        stream = await pushes.stream(pushes.stranger)
        await stream.send(pushes.push(torch.zeros(1, 3, HIDDEN), "a"))
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                await stream.receive()
        except TimeoutError:
            return "silence"
        except BadRequest as error:
            return str(error)
        finally:
            stream.abort()
        return "an answer"

    session = pushes.client.run(pushes.open())
    if early:
        assert pushes.stranger.run(intrude()) == "silence"
        pushes.client.run(pushes.announce(session, "a"))
    else:
        pushes.client.run(pushes.announce(session, "a"))
        assert pushes.stranger.run(intrude()) == "silence"

    async def finish() -> None:
        await pushes.silence(session)
        stream = await pushes.stream()
        await stream.send(pushes.push(hidden(), "a"))
        (got,) = await session.receive()
        torch.testing.assert_close(got, pushes.expected(hidden()), atol=1e-4, rtol=0)
        session.close()
        stream.abort()

    pushes.client.run(finish())


def test_what_is_pushed_is_checked_like_a_request(pushes: Pushes) -> None:
    async def main() -> None:
        for wrong in (torch.zeros(1, 3, HIDDEN - 1), torch.full((1, 3, HIDDEN), torch.nan)):
            session, stream = await pushes.open(), await pushes.stream()
            await pushes.announce(session, "a")
            await stream.send(pushes.push(wrong, "a"))
            with pytest.raises(BadRequest, match="hidden states"):
                await session.receive()
            session.close()
            stream.abort()

    pushes.client.run(main())


def test_a_push_that_is_none_is_dropped_and_its_stream_goes_on(pushes: Pushes) -> None:
    """Sessions share the stream: what one of them makes a server push harms no other."""

    async def main() -> None:
        stream, session, other = await pushes.stream(), await pushes.open(), await pushes.open()
        stranger = pushes.stranger.node.peer_id.to_base58()
        await pushes.announce(other, "for another sender", sender=stranger)
        await pushes.silence(other)
        for wrong in (
            pushes.push(hidden(), "for another sender"),
            pushes.push(hidden(), ""),
            PackedMessage(uid="x"),
            PackedMessage(metadata=b"\xc1"),
        ):
            await stream.send(wrong)
        await pushes.announce(session, "a")
        await stream.send(pushes.push(hidden(), "a"))
        async with asyncio.timeout(PATIENCE):
            (got,) = await session.receive()
        torch.testing.assert_close(got, pushes.expected(hidden()), atol=1e-4, rtol=0)
        await pushes.silence(other)
        session.close()
        other.close()
        stream.abort()

    pushes.client.run(main())


def test_pushes_that_nobody_announces_are_held_in_bounds(pushes: Pushes) -> None:
    """A flood is dropped; what came first within the bound is still there."""
    flood = torch.zeros(1, 4096, HIDDEN)
    count = EARLY_BYTES_PER_PEER // (flood.numel() * 4) + 40

    async def main() -> None:
        session, stream = await pushes.open(), await pushes.stream()
        await stream.send(pushes.push(hidden(), "first"))
        for number in range(count):
            await stream.send(pushes.push(flood, f"flood {number}"))
        await stream.send(pushes.push(flood, "last"))
        await pushes.announce(session, "first")
        (got,) = await session.receive()
        torch.testing.assert_close(got, pushes.expected(hidden()), atol=1e-4, rtol=0)
        # Once this one is through, so is what was sent before it.
        await pushes.announce(session, "next", 3)
        await stream.send(pushes.push(hidden(1), "next"))
        await session.receive()
        await pushes.announce(session, "last", 4)
        await pushes.silence(session)
        session.close()
        stream.abort()

    pushes.client.run(main())


def test_announcements_are_bounded(pushes: Pushes) -> None:
    async def main() -> None:
        session = await pushes.open()
        for number in range(inbox.MAX_ANNOUNCED + 1):
            await pushes.announce(session, str(number))
        with pytest.raises(BadRequest, match="announced already"):
            await session.receive()
        session.close()
        twice = await pushes.open()
        await pushes.announce(twice, "same")
        await pushes.announce(twice, "same")
        with pytest.raises(BadRequest, match="announced already"):
            await twice.receive()
        twice.close()

    pushes.client.run(main())


@pytest.mark.parametrize(
    ("target", "named"), [("x", "push_to"), (["a"], "push_to"), ([1, 2], "push_to")]
)
def test_a_target_must_be_one(pushes: Pushes, target: Any, named: str) -> None:
    async def main() -> None:
        session = await pushes.open()
        with pytest.raises(BadRequest, match=named):
            await session.step(pushes.uid, hidden(), push_to=target, start_from_position=0)
        session.close()

    pushes.client.run(main())


def test_a_target_that_is_not_there_costs_the_client_nothing(pushes: Pushes) -> None:
    async def main() -> None:
        session = await pushes.open()
        fields = {"session_id": pushes.id, "step_id": "a", "start_from_position": 0}
        target = ["QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "session"]
        await session.stream.send(request(pushes.uid, hidden(), push_to=target, **fields))
        async with asyncio.timeout(PATIENCE):
            answer = await session.stream.receive()
        assert answer is not None
        assert protocol.unpack_metadata(answer.metadata)["push_failed"]
        got = tensors.unpack(answer.tensors[0])
        torch.testing.assert_close(got, pushes.expected(hidden()), atol=1e-4, rtol=0)
        session.close()

    pushes.client.run(main())


def test_petals_unary_push(pushes: Pushes) -> None:
    """Into a session whose client leaves out positions, and sends the same step, too."""
    states = hidden(2)

    async def push(step: str) -> None:
        message = request(pushes.uid, states[:, 1:], session_id=pushes.id, step_id=step)
        await pushes.client.unary(pushes.bench.server.peer, protocol.RPC_PUSH, message)

    async def main() -> None:
        session = await pushes.open()
        fields = {"session_id": pushes.id, "max_length": 64}
        (first,) = await session.step(pushes.uid, states[:, :1], step_id="a", **fields)
        await push("b")
        (second,) = await session.receive()
        await session.stream.send(request(pushes.uid, states[:, 1:], step_id="b", **fields))
        await pushes.silence(session)
        got = torch.cat([first, second], dim=1)
        torch.testing.assert_close(got, pushes.expected(states), atol=1e-4, rtol=0)
        # What is pushed late, when others came in between, is known as well.
        more = torch.cat([states, hidden(2, 1)], dim=1)
        for number, step in ((2, "c"), (3, "d")):
            now = slice(number, number + 1)
            (got,) = await session.step(pushes.uid, more[:, now], step_id=step, **fields)
            torch.testing.assert_close(got, pushes.expected(more)[:, now], atol=1e-4, rtol=0)
            await push("b")
        await pushes.silence(session)
        with pytest.raises(P2PHandlerError, match="bad_request: rpc_push: no step_id"):
            await push("")
        session.close()
        await asyncio.sleep(QUIET_SECONDS)
        with pytest.raises(P2PHandlerError, match="bad_request: rpc_push: no session"):
            await push("e")

    pushes.client.run(main())
