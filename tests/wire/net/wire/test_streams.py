"""Streams between two peers of a swarm, through real daemons."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop
from hivemind.p2p import PeerID
from support.patience import PATIENCE

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.net.wire.opening import open_stream
from swarm_notebook.net.wire.stream_server import add_stream_handler
from swarm_notebook.net.wire.streams import Stream, StreamClosed

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


async def _answer(stream: Stream, _peer: PeerID) -> None:
    await stream.receive()
    await stream.send(PackedMessage(metadata=b"the last word"))


async def _refuse(stream: Stream, _peer: PeerID) -> None:
    raise BadRequest("not like this")


@asynccontextmanager
async def _opened(
    *handlers: Callable[[Stream, PeerID], Awaitable[None]],
) -> AsyncIterator[list[Stream]]:
    """Streams to a peer that handles each in one of these ways."""
    server = await Node.start(client=False)
    client = await Node.start(await server.addresses(), client=True)
    try:
        for handler in handlers:
            await add_stream_handler(server.p2p, handler.__name__, handler)
        yield [await open_stream(client.p2p, server.peer_id, one.__name__) for one in handlers]
    finally:
        await client.stop()
        await server.stop()


async def _talk() -> None:
    async with _opened(_answer, _refuse) as (stream, refused):
        await stream.send(PackedMessage(uid="question"))
        answer = await stream.receive()
        assert answer is not None
        assert answer.metadata == b"the last word"
        assert await stream.receive() is None
        stream.abort()

        for _ in range(64):  # more than lies between the two
            await refused.send(PackedMessage(metadata=bytes(1 << 18)))
        with pytest.raises(BadRequest, match="not like this"):
            await refused.receive()
        refused.abort()


async def _refuse_and_leave(stream: Stream, _peer: PeerID) -> None:
    await stream.send_error(BadRequest("not like this"))
    await asyncio.sleep(1.0)
    stream.abort()


async def _hang_up(stream: Stream, _peer: PeerID) -> None:
    stream.abort()


async def _keep_sending(stream: Stream) -> None:
    while True:
        await stream.send(PackedMessage(uid="hello?"))


async def _talk_to_nobody() -> None:
    async with _opened(_hang_up) as (stream,):
        # The first messages may still go out before the loop has noticed.
        with pytest.raises(StreamClosed, match="closed the stream without a reason"):
            await asyncio.wait_for(_keep_sending(stream), PATIENCE)
        for _ in range(3):
            with pytest.raises(StreamClosed):
                await stream.send(PackedMessage(uid="hello?"))
            await asyncio.sleep(0.1)


async def _talk_to_one_who_leaves() -> None:
    async with _opened(_refuse_and_leave) as (stream,):
        with pytest.raises(BadRequest, match="not like this"):
            await asyncio.wait_for(_keep_sending(stream), PATIENCE)


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_the_last_word_is_heard_by_who_is_still_sending(loop: LoopFactory) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(_talk_to_one_who_leaves())


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_who_sends_to_a_peer_that_has_gone_is_told(loop: LoopFactory) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(_talk_to_nobody())


def test_who_has_the_last_word_leaves_the_closing_to_the_other() -> None:
    asyncio.run(_talk())
