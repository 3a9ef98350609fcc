"""A peer of the swarm by itself."""

from __future__ import annotations

import asyncio
import time

from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.proto import runtime_pb2

from swarm_notebook.net.node import Node


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
        async with asyncio.timeout(5):
            return await call(peer, "echo", b"still there")
    finally:
        await client.stop()
        await server.stop()


def test_an_answer_that_comes_with_its_timeout_does_not_deafen_the_node() -> None:
    """Both are ready in one turn of the loop; hivemind's reader of answers would die of it."""
    assert asyncio.run(_stall_and_call()) == b"still there"
