"""Waiting for a result while the peer may leave, over a real pair of sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable

import pytest
import torch
from hivemind.proto import runtime_pb2

from swarm_notebook.net import protocol, tensors
from swarm_notebook.net.streams import Stream, StreamClosed
from swarm_notebook.server import exchange
from swarm_notebook.server.compute import ComputeThread


def connected(work: Callable[[Stream, Stream, ComputeThread], Awaitable[None]]) -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        ours = Stream(*await asyncio.open_connection(sock=near), "far")
        theirs = Stream(*await asyncio.open_connection(sock=far), "near")
        compute = ComputeThread()
        try:
            await work(ours, theirs, compute)
        finally:
            compute.stop()
            ours.close()
            theirs.close()

    asyncio.run(main())


def test_work_for_a_peer_that_leaves_is_given_up() -> None:
    async def work(ours: Stream, theirs: Stream, compute: ComputeThread) -> None:
        gate, ran = threading.Event(), []
        running = compute.submit(gate.wait)
        queued = compute.submit(ran.append, "queued")
        await theirs.send_end()
        assert await ours.receive(runtime_pb2.ExpertRequest) is None
        waiting = asyncio.create_task(exchange.result(queued, ours))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        theirs.close()
        with pytest.raises(StreamClosed):
            await waiting
        gate.set()
        await running.future
        await compute.submit(lambda: None).future
        assert ran == []

    connected(work)


def test_a_result_or_an_error_comes_to_a_peer_that_stays() -> None:
    async def work(ours: Stream, _theirs: Stream, compute: ComputeThread) -> None:
        assert await exchange.result(compute.submit(lambda: 5), ours) == 5
        with pytest.raises(ZeroDivisionError):
            await exchange.result(compute.submit(lambda: 1 // 0), ours)
        assert await exchange.result(compute.submit(lambda: 6)) == 6

    connected(work)


def test_tensors_large_and_small_come_as_they_were_sent() -> None:
    async def work(ours: Stream, theirs: Stream, _compute: ComputeThread) -> None:
        sent = [torch.randn(40), torch.randn(1 << 21), *(torch.randn(3, 2) for _ in range(50))]
        packed = exchange.pack(sent, tensors.NONE)
        answering = asyncio.create_task(exchange.send(ours, packed, {"names": ["a"]}))
        messages = []
        while (message := await theirs.receive(runtime_pb2.ExpertResponse)) is not None:
            messages.append(message)
        await answering
        assert protocol.unpack_metadata(messages[0].metadata) == {"names": ["a"]}
        assert not any(message.metadata for message in messages[1:])
        assert len(messages) <= 5
        assert max(message.ByteSize() for message in messages) <= protocol.PART_BYTES + 4096
        parts = [part for message in messages for part in message.tensors]
        found = [tensors.unpack(tensor) for tensor in tensors.join(parts)]
        assert all(torch.equal(one, other) for one, other in zip(sent, found, strict=True))

    connected(work)
