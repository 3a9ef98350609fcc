"""Streams that are being opened when nobody waits for them any more, by real nodes."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import uvloop
from hivemind.p2p import P2PDaemonError
from support.patience import PATIENCE

from swarm_notebook.net.node import Node
from swarm_notebook.net.wire.opening import open_stream

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
LOOPS = pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
# Nobody has it: p2pd would open a stream to a handler that it knows of before the peer says a word.
HANDLER = "Test.unknown"


def _complaints() -> list[str]:
    """What the loop is told that nobody else is, from now on."""
    told: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: told.append(context["message"])
    )
    return told


@asynccontextmanager
async def _silent_server() -> AsyncIterator[tuple[Node, Node, int]]:
    """A server and a client, and the server's daemon, which stands still."""
    server = await Node.start(client=False)
    client = await Node.start(await server.addresses(), client=True)
    daemon = server.p2p._child.pid
    os.kill(daemon, signal.SIGSTOP)
    try:
        yield server, client, daemon
    finally:
        os.kill(daemon, signal.SIGCONT)
        await client.stop()
        await server.stop()


def _opening() -> list[asyncio.Task[object]]:
    return [task for task in asyncio.all_tasks() if "opened" in repr(task.get_coro())]


async def _give_up(server: Node, client: Node) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            while True:
                # A thread of the daemon that has not stopped yet may still answer.
                with suppress(P2PDaemonError):
                    await open_stream(client.p2p, server.peer_id, HANDLER)
    await asyncio.sleep(0)
    for _ in range(2):  # what is freed first may be what frees the rest
        gc.collect()


async def _open_late() -> list[str]:
    told = _complaints()
    async with _silent_server() as (server, client, daemon):
        await _give_up(server, client)
        (opening,) = _opening()
        os.kill(daemon, signal.SIGCONT)
        await asyncio.wait([opening], timeout=PATIENCE)
        assert opening.done()
    return told


@LOOPS
def test_what_nobody_waits_for_goes_on_to_its_end(loop: LoopFactory) -> None:
    """It was garbage: "Task was destroyed but it is pending", and the stream half open."""
    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(_open_late()) == []


async def _leave_meanwhile() -> list[str]:
    told = _complaints()
    async with _silent_server() as (server, client, _):
        await _give_up(server, client)
        waits = asyncio.create_task(open_stream(client.p2p, server.peer_id, HANDLER))
        await asyncio.sleep(0.3)
        await client.stop()
        assert _opening() == []
        with suppress(P2PDaemonError):  # in its own words, or in p2pd's last ones
            (await waits).abort()
    return told


@LOOPS
def test_a_node_ends_with_what_it_was_opening(loop: LoopFactory) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(_leave_meanwhile()) == []
