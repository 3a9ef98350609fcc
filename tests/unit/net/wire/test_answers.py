"""What a notebook holds of answers is bounded for all servers together, over real sockets."""

from __future__ import annotations

import asyncio
import socket

import pytest
from support.patience import PATIENCE

from swarm_notebook.errors import ServerBusy
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.net.wire.streams import Stream
from swarm_notebook.net.wire.traffic import Traffic

MIB = 1 << 20
LIARS, TOTAL, FRAME = 6, 16 * MIB, 8 * MIB


async def connected(peer: str, budget: Traffic) -> tuple[Stream, asyncio.StreamWriter]:
    near, far = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=near)
    stream = Stream(reader, writer, peer, answers=True, account=budget.open(peer))
    return stream, (await asyncio.open_connection(sock=far))[1]


def test_several_liars_at_once_hold_no_more_than_the_budget() -> None:
    """Each begins a large answer and never ends it; an honest one gets the room of one of them."""

    async def main() -> None:
        budget = Traffic(TOTAL)
        pairs = [await connected(f"liar {number}", budget) for number in range(LIARS)]
        waiting = [asyncio.create_task(stream.receive()) for stream, _ in pairs]
        for _, writer in pairs:
            writer.write(b"\x00" + FRAME.to_bytes(8, "big") + b"\x0a\x80")
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if budget.held > TOTAL // 2:
                break
        assert TOTAL // 2 < budget.held <= TOTAL
        honest, writer = await connected("honest", budget)
        data = PackedMessage(metadata=bytes(2 * MIB)).to_bytes()
        writer.write(b"\x00" + len(data).to_bytes(8, "big") + data)
        async with asyncio.timeout(PATIENCE):
            answer = await honest.receive()
        assert answer is not None
        assert len(answer.metadata) == 2 * MIB
        assert budget.held <= TOTAL
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        ended = [task for task in waiting if task.done()]
        assert all(isinstance(task.exception(), ServerBusy) for task in ended)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        honest.account.close()
        assert budget.held == 0
        for stream, far in [*pairs, (honest, writer)]:
            stream.close()
            far.close()

    asyncio.run(main())


def test_room_that_comes_too_late_is_given_back() -> None:
    async def main() -> None:
        budget = Traffic(TOTAL, TOTAL)
        first, second = budget.open("one"), budget.open("two")
        assert first.try_take(14 * MIB)
        waiting = asyncio.create_task(second.take(4 * MIB))
        await asyncio.sleep(0)
        first.close()  # grants it
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert budget.held == 0

    asyncio.run(main())
