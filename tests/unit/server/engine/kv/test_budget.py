"""Who gets cache memory, who waits, and who loses it: decisions first, then the waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from swarm_notebook.errors import CacheFull, ServerBusy, SessionLost
from swarm_notebook.server.engine.kv import budget as kv_budget
from swarm_notebook.server.engine.kv.budget import CachePool, Grant, KVBudget, Reservation
from swarm_notebook.server.engine.kv.cache import grown_capacity


def budget(total: int, *held: tuple[int, float, bool]) -> tuple[KVBudget, list[Reservation]]:
    """A budget with one reservation per (tokens, last use, busy)."""
    reservations = [
        Reservation(drop=lambda: None, tokens=tokens, last_used=used, busy=busy)
        for tokens, used, busy in held
    ]
    return KVBudget(total, list(reservations)), reservations


def test_room_ahead_is_granted_while_there_is_room() -> None:
    books, (mine, _) = budget(100, (10, 0, True), (30, 0, True))
    assert books.free == 60
    assert books.decide(mine, 70, 20, now=0, idle_seconds=30) == Grant(70)
    assert books.decide(mine, 71, 20, now=0, idle_seconds=30) == Grant(20)
    assert books.decide(mine, 90, 71, now=0, idle_seconds=30) is None


def test_idle_sessions_go_the_longest_idle_first_and_no_more_than_needed() -> None:
    books, (mine, newer, older, newest) = budget(
        100, (0, 100, True), (30, 60, False), (30, 50, False), (40, 69, False)
    )
    assert books.decide(mine, 100, 30, now=100, idle_seconds=30) == Grant(30, (older,))
    assert books.decide(mine, 100, 31, now=100, idle_seconds=30) == Grant(60, (older, newer))
    assert books.decide(mine, 50, 31, now=100, idle_seconds=30) == Grant(50, (older, newer))
    assert books.decide(mine, 100, 61, now=100, idle_seconds=31) is not None
    assert books.decide(mine, 100, 61, now=98, idle_seconds=30) is None
    books.apply(mine, Grant(61, (older, newer, newest)))
    assert (books.free, books.reservations, older.tokens) == (39, [mine], 0)


def test_a_session_with_a_step_in_flight_is_never_dropped() -> None:
    books, (mine, _) = budget(100, (0, 0, True), (90, 0, True))
    assert books.decide(mine, 20, 20, now=1e6, idle_seconds=0) is None


def shared(total: int, **held: list[int]) -> tuple[KVBudget, dict[str, list[Reservation]]]:
    """A budget with busy sessions of each client; later ones are the longer unused."""
    made = {
        client: [
            Reservation(lambda: None, client, tokens, busy=True, last_used=-number)
            for number, tokens in enumerate(tokens)
        ]
        for client, tokens in held.items()
    }
    return KVBudget(total, [one for sessions in made.values() for one in sessions]), made


def test_who_has_less_than_its_share_takes_from_who_has_most() -> None:
    books, made = shared(120, most=[30, 30], more=[50], mine=[10])
    (mine,), (newer, older), (more,) = made["mine"], made["most"], made["more"]
    wanted = [
        (11, Grant(20, (older,))),
        (40, Grant(40, (older,))),  # exactly its share of three
        (41, None),
    ]
    for minimum, grant in wanted:
        assert books.decide(mine, max(20, minimum), minimum, now=0, idle_seconds=30) == grant
    # The one that has most now loses its only session, as it is beyond its share.
    older.tokens = 0
    mine.tokens = 40
    assert books.decide(more, 51, 51, now=0, idle_seconds=30) is None
    other = Reservation(lambda: None, "other", busy=True)
    books.reservations.append(other)
    assert books.decide(other, 30, 30, now=0, idle_seconds=30) == Grant(30, (more,))
    assert newer in books.reservations


def test_what_is_free_and_who_is_idle_comes_before_shares() -> None:
    books, made = shared(100, most=[50, 20], idle=[20], mine=[0])
    (mine,), (idle,) = made["mine"], made["idle"]
    idle.busy, idle.last_used = False, -100
    assert books.decide(mine, 10, 10, now=0, idle_seconds=30) == Grant(10)
    assert books.decide(mine, 30, 30, now=0, idle_seconds=30) == Grant(30, (idle,))
    assert books.decide(mine, 33, 33, now=0, idle_seconds=30) == Grant(33, (idle, made["most"][1]))


def test_many_identities_take_nothing_of_what_is_protected() -> None:
    books, made = shared(800, honest=[60, 40], **{f"made up {n}": [35] for n in range(20)})
    stranger = Reservation(lambda: None, "stranger", busy=True)
    books.reservations.append(stranger)
    assert books.free == 0
    assert books.decide(stranger, 20, 20, now=0, idle_seconds=30) is None
    made["made up 0"][0].tokens, made["honest"][0].tokens = 34, 61
    assert books.decide(stranger, 20, 20, now=0, idle_seconds=30) == Grant(20, (made["honest"][1],))


def test_a_client_takes_nothing_from_itself_by_shares() -> None:
    books, made = shared(100, mine=[50, 50, 0])
    assert books.decide(made["mine"][2], 10, 10, now=0, idle_seconds=30) is None


def test_sessions_without_memory_are_not_dropped_in_vain() -> None:
    books, (mine, empty, holder) = budget(100, (0, 0, True), (0, 0, False), (100, 1, False))
    grant = books.decide(mine, 20, 20, now=100, idle_seconds=30)
    assert grant == Grant(20, (holder,))
    assert empty in books.reservations


def test_one_client_may_have_so_many_sessions() -> None:
    books = KVBudget(
        100, [Reservation(lambda: None, "mine") for _ in range(kv_budget.CLIENT_SESSIONS)]
    )
    with pytest.raises(ServerBusy, match="128 sessions open"):
        books.admit("mine", now=1e6)
    assert books.admit("other", now=0) is None


def test_when_all_sessions_are_taken_the_longest_idle_one_makes_room() -> None:
    books = KVBudget(100, [Reservation(lambda: None, busy=True) for _ in range(kv_budget.SESSIONS)])
    with pytest.raises(ServerBusy, match="all of the 1024 sessions"):
        books.admit("mine", now=100)
    newer, older = books.reservations[5], books.reservations[9]
    newer.busy = older.busy = False
    newer.last_used, older.last_used = 60, 50
    assert books.admit("mine", now=100) is older
    assert books.admit("mine", now=85) is older
    with pytest.raises(ServerBusy):
        books.admit("mine", now=79)


def test_capacity_grows_by_pages_up_to_what_the_model_can_use() -> None:
    assert grown_capacity(0, 5) == 64
    assert grown_capacity(64, 65) == 128
    assert grown_capacity(128, 100) == 128
    assert grown_capacity(64, 1000) == 1152
    assert grown_capacity(0, 5, limit=20) == 20
    assert grown_capacity(128, 130, limit=140) == 140


def test_growth_is_seldom_and_little_of_it_lies_idle() -> None:
    capacity, moved = 0, 0
    for length in range(1, 4097):
        grown = grown_capacity(capacity, length)
        moved += length - 1 if grown > capacity else 0
        capacity = grown
        assert capacity - length < length / 8 + 64
    # Positions moved, against positions that attention reads in 4096 steps of decoding.
    assert moved < 0.01 * 4096**2 / 2


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_more_than_the_server_has_is_refused_at_once() -> None:
    async def work() -> None:
        pool = CachePool(100)
        with pytest.raises(CacheFull, match=r"101 cache tokens.*100"):
            await pool.resize(pool.open(lambda: None), 200, 101, wait=60)

    run(work())


def test_a_request_waits_for_memory_that_comes_free() -> None:
    async def work() -> None:
        pool = CachePool(100)
        first, second = pool.open(lambda: None), pool.open(lambda: None)
        pool.begin(first)
        assert await pool.resize(first, 80, 80, wait=0) == 80
        waiting = asyncio.create_task(pool.resize(second, 100, 50, wait=10))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        pool.close(first)
        assert await waiting == 100
        pool.close(first)
        assert (pool.free, pool.sessions) == (0, 1)
        assert await pool.resize(second, 10, 10, wait=0) == 10
        assert pool.free == 90

    run(work())


def test_a_wait_in_vain_names_the_numbers() -> None:
    async def work() -> None:
        pool = CachePool(100)
        holder = pool.open(lambda: None)
        pool.begin(holder)
        await pool.resize(holder, 80, 80, wait=0)
        with pytest.raises(CacheFull, match=r"asked for 50 .*20 of 100 are free"):
            await pool.resize(pool.open(lambda: None), 64, 50, wait=0.05)

    run(work())


def test_a_session_that_was_idle_during_the_whole_wait_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_budget, "SHORT_IDLE_SECONDS", 0.2)

    async def work() -> None:
        clock, lost = Clock(), []
        pool = CachePool(100, clock)
        idle, active = pool.open(lambda: lost.append("idle")), pool.open(lambda: lost.append("no"))
        for reservation in (idle, active):
            pool.begin(reservation)
            await pool.resize(reservation, 50, 50, wait=0)
            pool.end(reservation)
        new, seconds = pool.open(lambda: None), 2 * kv_budget.SHORT_IDLE_SECONDS
        waiting = asyncio.create_task(pool.resize(new, 50, 50, wait=seconds))
        await asyncio.sleep(0)
        clock.now += seconds - 0.1
        pool.begin(active)
        pool.end(active)
        assert not lost
        clock.now += 0.1
        assert await waiting == 50
        assert lost == ["idle"]
        assert pool.sessions == 2

    run(work())


def test_an_idle_notebook_keeps_its_memory_until_others_need_it() -> None:
    async def work() -> None:
        clock, lost = Clock(), []
        pool = CachePool(100, clock)
        idle = pool.open(lambda: lost.append("idle"))
        await pool.resize(idle, 60, 60, wait=0)
        clock.now += 3600
        other = pool.open(lambda: None)
        await pool.resize(other, 40, 40, wait=0)
        assert lost == []
        await pool.resize(other, 128, 41, wait=0)
        assert lost == ["idle"]

    run(work())


def test_memory_of_a_step_in_flight_is_had_when_that_is_done_and_by_nobody_else() -> None:
    async def work() -> None:
        pool, lost = CachePool(100), list[str]()
        greedy = [pool.open(lambda: lost.append("one"), "greedy") for _ in range(2)]
        for reservation in greedy:
            pool.begin(reservation)
            await pool.resize(reservation, 50, 50, wait=0)
        grows = asyncio.create_task(pool.resize(greedy[1], 70, 70, wait=9))
        other = pool.open(lambda: None, "other")
        pool.begin(other)
        getting = asyncio.create_task(pool.resize(other, 40, 40, wait=0))
        await asyncio.sleep(0.01)
        assert lost == ["one"]
        assert not getting.done()
        pool.close(greedy[0])
        assert await getting == 40
        await asyncio.sleep(0.01)
        assert not grows.done()
        assert (pool.free, pool.sessions) == (10, 2)
        third = pool.open(lambda: None, "third")
        pool.begin(third)
        asking = asyncio.create_task(pool.resize(third, 30, 30, wait=0))
        with pytest.raises(SessionLost):
            await grows
        pool.close(greedy[1])
        assert await asking == 30

    run(work())


def test_few_may_wait_and_who_holds_memory_looks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_budget, "WAITING", 3)
    monkeypatch.setattr(kv_budget, "CLIENT_WAITING", 2)

    async def work() -> None:
        pool = CachePool(100)
        full, holder = pool.open(lambda: None), pool.open(lambda: None, "grows")
        for reservation, tokens in ((full, 80), (holder, 20)):
            pool.begin(reservation)
            await pool.resize(reservation, tokens, tokens, wait=0)
        new = [pool.open(lambda: None, "new") for _ in range(3)]
        waits = [asyncio.create_task(pool.resize(each, 70, 70, wait=9)) for each in new[:2]]
        await asyncio.sleep(0)
        with pytest.raises(ServerBusy, match="2 sessions wait for cache memory already, 2 of them"):
            await pool.resize(new[2], 70, 70, wait=9)
        grows = asyncio.create_task(pool.resize(holder, 90, 90, wait=9))
        await asyncio.sleep(0)
        with pytest.raises(ServerBusy, match="3 sessions wait for cache memory already, 0 of them"):
            await pool.resize(pool.open(lambda: None), 70, 70, wait=9)
        pool.close(full)
        assert await grows == 90
        assert not any(wait.done() for wait in waits)
        pool.close(holder)
        assert await waits[0] == 70
        waits[1].cancel()

    run(work())
