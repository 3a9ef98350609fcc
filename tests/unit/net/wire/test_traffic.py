"""Who may hold how much of a server's memory for traffic."""

from __future__ import annotations

import asyncio

import pytest
from support.patience import PATIENCE

from swarm_notebook.errors import ServerBusy
from swarm_notebook.net.wire import traffic
from swarm_notebook.net.wire.traffic import EXTRA_BYTES, LITTLE_BYTES, Traffic

MIB = 1 << 20


def test_a_peer_has_its_share_and_all_have_the_total() -> None:
    budget = Traffic(100 * MIB, 60 * MIB)
    mine, mine_too, others = budget.open("me"), budget.open("me"), budget.open("other")
    assert mine.try_take(50 * MIB)
    assert not mine_too.try_take(11 * MIB)
    assert mine_too.try_take(10 * MIB)
    assert not others.try_take(41 * MIB)
    assert others.try_take(40 * MIB)
    mine.resize(20 * MIB)
    assert budget.held == 70 * MIB
    for account in (mine, mine_too, others):
        account.close()
        account.close()
    assert budget.held == 0


def test_who_holds_next_to_nothing_is_let_in() -> None:
    budget = Traffic(100 * MIB)
    assert budget.open("one").try_take(50 * MIB)
    assert budget.open("two").try_take(50 * MIB)
    crowd = [budget.open(f"peer {number}").try_take(LITTLE_BYTES) for number in range(1000)]
    assert sum(crowd) == EXTRA_BYTES // LITTLE_BYTES
    assert not budget.open("one").try_take(1)


def test_what_does_not_fit_waits_and_a_lone_request_always_fits() -> None:
    async def main() -> None:
        budget = Traffic(16 * MIB, 8 * MIB)
        first, second = budget.open("me"), budget.open("me")
        assert budget.open("me").try_take(MIB)
        assert await first.take(100 * MIB) == 7 * MIB
        waiting = asyncio.create_task(second.take(3 * MIB))
        await asyncio.sleep(0)
        assert not waiting.done()
        first.resize(3 * MIB)
        assert await asyncio.wait_for(waiting, PATIENCE) == 3 * MIB
        assert budget.held == 7 * MIB

    asyncio.run(main())


def test_a_wait_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "WAIT_SECONDS", 0.05)

    async def main() -> None:
        budget = Traffic(10 * MIB, 6 * MIB)
        assert budget.open("me").try_take(6 * MIB)
        with pytest.raises(ServerBusy, match="this peer holds 6291456 of 6291456"):
            await budget.open("me").take(MIB)
        assert budget.held == 6 * MIB

    asyncio.run(main())


def test_whoever_holds_most_and_is_waited_for_gives_way() -> None:
    async def main() -> None:
        budget = Traffic(10 * MIB, 6 * MIB)
        given_way: list[str] = []

        async def dawdle(peer: str, size: int) -> None:
            account = budget.open(peer)
            assert account.try_take(size)
            try:
                async with account.waiting_for_peer(PATIENCE):
                    await asyncio.Event().wait()
            except ServerBusy:
                given_way.append(peer)
            finally:
                account.close()

        slow = [asyncio.create_task(dawdle("large", 6 * MIB))]
        slow.append(asyncio.create_task(dawdle("small", 4 * MIB)))
        await asyncio.sleep(0)
        honest = budget.open("honest")
        assert await asyncio.wait_for(honest.take(3 * MIB), PATIENCE) == 3 * MIB
        assert given_way == ["large"]
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert budget.held == 3 * MIB

    asyncio.run(main())
