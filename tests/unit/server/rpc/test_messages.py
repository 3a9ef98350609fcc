"""Waiting for a result while the peer may leave, over a real pair of sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable

import pytest
import torch

from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.streams import Stream, StreamClosed
from swarm_notebook.server.engine.scheduling.worker import ComputeThread
from swarm_notebook.server.rpc import messages


def connected(work: Callable[[Stream, Stream, ComputeThread], Awaitable[None]]) -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        ours = Stream(*await asyncio.open_connection(sock=near), "far")
        theirs = Stream(*await asyncio.open_connection(sock=far), "near", answers=True)
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
        assert await ours.receive() is None
        waiting = asyncio.create_task(messages.result(queued, ours))
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
        assert await messages.result(compute.submit(lambda: 5), ours) == 5
        with pytest.raises(ZeroDivisionError):
            await messages.result(compute.submit(lambda: 1 // 0), ours)
        assert await messages.result(compute.submit(lambda: 6)) == 6

    connected(work)


def test_tensors_large_and_small_come_as_they_were_sent() -> None:
    async def work(ours: Stream, theirs: Stream, _compute: ComputeThread) -> None:
        sent = [torch.randn(40), torch.randn(1 << 21), *(torch.randn(3, 2) for _ in range(50))]
        packed = messages.pack(sent, tensors.NONE)

        async def answer() -> None:
            await messages.send(ours, packed, {"names": ["a"]})
            await ours.end_answers()

        answering = asyncio.create_task(answer())
        got = []
        while (message := await theirs.receive()) is not None:
            got.append(message)
        await answering
        assert protocol.unpack_metadata(got[0].metadata) == {"names": ["a"], "tensors": 52}
        assert not any(message.metadata for message in got[1:])
        assert len(got) <= 5
        assert max(message.size for message in got) <= protocol.PART_BYTES + 4096
        parts = [part for message in got for part in message.tensors]
        found = [tensors.unpack(tensor) for tensor in tensors.join(parts)]
        assert all(torch.equal(one, other) for one, other in zip(sent, found, strict=True))

    connected(work)
