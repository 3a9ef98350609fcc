"""A peer of the swarm by itself."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest
from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.proto import runtime_pb2
from support.patience import PATIENCE

from swarm_notebook.net.node import Node
from swarm_notebook.net.p2p import daemon


async def _echo(data: bytes, _peer: PeerID) -> bytes:
    return data


async def _stall_and_call() -> bytes:
    server = await Node.start(client=False)
    client = await Node.start(await server.addresses(), client=True)
    try:
        await server.p2p._client.add_unary_handler("echo", _echo)
        peer, message = server.peer_id, runtime_pb2.ExpertUID(uid="x")
        call = client.p2p._client.call_unary_handler
        await call(peer, "echo", message.SerializeToString())
        for _ in range(5):
            try:
                async with asyncio.timeout(0.05):
                    calling = asyncio.ensure_future(call(peer, "echo", b"late"))
                    await asyncio.sleep(0.001)  # it is on its way
                    time.sleep(0.2)  # noqa: ASYNC251 - the loop is held up, as on a busy machine
                    await calling
            except (TimeoutError, P2PDaemonError):
                pass
        async with asyncio.timeout(PATIENCE):
            return await call(peer, "echo", b"still there")
    finally:
        await client.stop()
        await server.stop()


def test_an_answer_that_comes_with_its_timeout_does_not_deafen_the_node() -> None:
    """Both are ready in one turn of the loop; hivemind's reader of answers would die of it."""
    assert asyncio.run(_stall_and_call()) == b"still there"


async def _ask_and_give_up(times: int) -> list[int]:
    """How many calls a server has in its books: while they wait, and after they were given up."""
    server = await Node.start(client=False)
    client = await Node.start(await server.addresses(), client=True)
    begun = asyncio.Semaphore(0)

    async def hang(_data: bytes, _peer: PeerID) -> bytes:
        begun.release()
        await asyncio.Future()
        return b""

    books = server.p2p._client.control._handler_tasks
    try:
        await server.p2p._client.add_unary_handler("hang", hang)
        call = client.p2p._client.call_unary_handler
        calls = [asyncio.ensure_future(call(server.peer_id, "hang", b"x")) for _ in range(times)]
        for _ in calls:
            await begun.acquire()
        counts = [len(books)]
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.wait(list(books.values()), timeout=PATIENCE)
        await asyncio.sleep(0)  # for those who wait for their end
        return [*counts, len(books)]
    finally:
        await client.stop()
        await server.stop()


def test_a_call_that_was_given_up_is_forgotten() -> None:
    """A server would keep it, and what it was sent."""
    assert asyncio.run(_ask_and_give_up(5)) == [5, 0]


async def _forget_and_redial() -> tuple[int, int]:
    """How many peers a node knows in the DHT: after they were silent, and after it dialled them."""
    server = await Node.start(client=False)
    client = await Node.start(await server.addresses(), client=True)
    try:
        table = client.dht.protocol.routing_table.uid_to_peer_id
        # What the DHT does with a peer that does not answer, and what becomes of its connection.
        await client.dht.protocol.update_routing_table(None, server.peer_id, responded=False)
        await client.p2p._client.disconnect(server.peer_id)
        silent = len(table)
        await client.redial()
        return silent, len(table)
    finally:
        await client.stop()
        await server.stop()


def test_peers_that_were_silent_are_found_again() -> None:
    assert asyncio.run(_forget_and_redial()) == (0, 1)


@pytest.mark.parametrize("lost", ["connection", "output"])
def test_a_daemon_that_is_not_heard_any_more_ends(lost: str) -> None:
    """As when there was no memory for what it said; whoever has it waits for its end."""

    async def work() -> None:
        node = await Node.start(client=False)
        if lost == "connection":
            node.p2p._client.control._write_task.cancel()  # which closes it
        else:
            node.p2p._child.stdout.set_exception(MemoryError())
        async with asyncio.timeout(PATIENCE):
            await daemon.ended(node.p2p)
        await daemon.clear_up(node.p2p)

    asyncio.run(work())


async def _redial_through_a_daemon_that_ends() -> None:
    """It is asked while it is stopped, and ends before it has answered."""
    server = await Node.start(client=False)
    client = await Node.start(await server.addresses(), client=True)
    try:
        child = client.p2p._child
        assert child is not None
        child.send_signal(signal.SIGSTOP)
        redialling = asyncio.create_task(client.redial())
        await asyncio.sleep(0.1)
        child.kill()
        async with asyncio.timeout(PATIENCE):
            await redialling
    finally:
        await client.stop()
        await server.stop()


def test_a_daemon_that_ends_while_it_is_asked_is_one_that_does_not_answer() -> None:
    asyncio.run(_redial_through_a_daemon_that_ends())
