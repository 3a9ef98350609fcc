"""Who is refused again and again is heard late, and nobody else is."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from hivemind.utils.multiaddr import Multiaddr

from swarm_notebook.errors import BadRequest, CacheFull, ServerBusy
from swarm_notebook.net.wire import conduct
from swarm_notebook.net.wire.conduct import (
    FORGIVEN_IN_ALL,
    FREE_AT_ADDRESS,
    FREE_IN_ALL,
    FREE_REFUSALS,
    MAX_PEERS,
    MOST_IN_ALL,
    MOST_REFUSALS,
    Conduct,
    network_of,
)

WRONG = BadRequest("no tensor")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which goes on only where somebody sleeps, and where a test says so."""
    now = [100.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(conduct, "_now", lambda: now[0])
    # Not in asyncio itself: other threads' loops sleep, too, as those of tests before.
    monkeypatch.setattr(conduct, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    return now


def waited(known: Conduct, peer: str, clock: list[float]) -> float:
    before = clock[0]
    asyncio.run(known.turn(peer))
    return clock[0] - before


def refuse(known: Conduct, peer: str, times: float) -> None:
    for _ in range(int(times)):
        known.refused(peer, WRONG)


def come(known: Conduct, *peers: str, number: str = "1.2.3.4") -> None:
    for peer in peers:
        known.met(peer, Multiaddr(f"/ip4/{number}/tcp/31337"))


def test_new_identities_of_an_address_share_what_is_free(clock: list[float]) -> None:
    known = Conduct()
    crowd = [f"crowd {number}" for number in range(3 * int(FREE_AT_ADDRESS / FREE_REFUSALS))]
    come(known, "notebook", "newcomer", *crowd)
    come(known, "far away", number="1.2.3.5")
    known.answered("notebook", 1)
    for peer in crowd:
        refuse(known, peer, FREE_REFUSALS)
    assert "new at its address were refused too many times" in known.told("newcomer")
    assert 0.0 < waited(known, "newcomer", clock) < 2.0
    for peer in ("notebook", "far away"):
        assert waited(known, peer, clock) == 0.0
        assert known.told(peer) == ""
    assert not known.cut_off("newcomer")
    known.answered("newcomer", 1)
    assert waited(known, "newcomer", clock) == 0.0


def test_a_crowd_of_addresses_shares_what_is_free_and_comes_one_by_one(clock: list[float]) -> None:
    known = Conduct()
    come(known, "notebook", number="9.9.9.9")
    known.answered("notebook", 1)
    each = FREE_AT_ADDRESS / 4
    addresses = [f"1.2.3.{number}" for number in range(int(FREE_IN_ALL / each) + 1)]
    for number in addresses:
        come(known, f"crowd {number}", f"next {number}", f"last {number}", number=number)
        refuse(known, f"crowd {number}", each)
    come(known, "newcomer", number="9.9.9.9")
    come(known, "far away", number="8.8.8.8")
    for peer in ("notebook", "newcomer", "far away"):
        assert waited(known, peer, clock) == 0.0
        assert known.told(peer) == ""
    one, other = f"next {addresses[0]}", f"last {addresses[0]}"
    alone = waited(known, f"next {addresses[1]}", clock)
    assert 0.0 < alone < 2.0

    async def both() -> None:
        await asyncio.gather(known.turn(one), known.turn(other))

    before = clock[0]
    asyncio.run(both())
    assert clock[0] - before > 1.5 * alone
    clock[0] += MOST_IN_ALL / FORGIVEN_IN_ALL
    assert waited(known, other, clock) == 0.0


def test_answers_pay_for_refusals_and_a_flood_of_one_peer_is_its_own(clock: list[float]) -> None:
    known = Conduct()
    come(known, "flood", "clumsy", "newcomer")
    refuse(known, "flood", 100 * MOST_REFUSALS)
    known.answered("clumsy", 1000)
    refuse(known, "clumsy", FREE_REFUSALS)
    assert waited(known, "newcomer", clock) == 0.0
    refuse(known, "newcomer", FREE_REFUSALS)
    come(known, "next")
    refuse(known, "next", 2)
    assert waited(known, "next", clock) > 0.0


def test_peers_of_no_known_address_share_one(clock: list[float]) -> None:
    known = Conduct()
    for number in range(2 * int(FREE_AT_ADDRESS)):
        refuse(known, f"unary {number}", 1)
    assert waited(known, "unary", clock) > 0.0


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("/ip4/1.2.3.4/tcp/5", "1.2.3.4/32"),
        ("/ip6/2001:db8:1:2:3::4/udp/5/quic", "2001:db8:1:2::/64"),
        ("/ip4/1.2.3.4/tcp/5/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC/p2p-circuit", None),
        ("/dns4/example.org/tcp/5", ""),
    ],
)
def test_what_of_an_address_costs_something(address: str, network: str | None) -> None:
    assert network_of(Multiaddr(address)) == ("1.2.3.4/32" if network is None else network)


def test_some_refusals_are_free(clock: list[float]) -> None:
    known = Conduct()
    refuse(known, "a notebook", FREE_REFUSALS)
    assert waited(known, "a notebook", clock) == 0.0
    assert known.told("a notebook") == ""


def test_who_goes_on_is_heard_late_and_told_so_and_nobody_else(clock: list[float]) -> None:
    known = Conduct()
    refuse(known, "flood", FREE_REFUSALS + 10)
    early = waited(known, "flood", clock)
    refuse(known, "flood", 10 * MOST_REFUSALS)
    assert "refused 128 times of late, so it is heard 1.3 s late" in known.told("flood")
    assert waited(known, "flood", clock) > early > 0.0
    assert waited(known, "another", clock) == 0.0
    assert known.told("another") == ""


def test_who_never_stops_is_cut_off_for_a_while(clock: list[float]) -> None:
    known = Conduct()
    for _ in range(int(conduct.CUT_AFTER) + 1):
        assert not known.cut_off("flood")
        refuse(known, "flood", 2 * FREE_REFUSALS)
        clock[0] += 1.0
    assert known.cut_off("flood")
    assert not known.cut_off("another")
    for number in range(MAX_PEERS):
        refuse(known, f"crowd {number}", 1)
    clock[0] += conduct.CUT_SECONDS - 2.0
    assert known.cut_off("flood")
    clock[0] += 2.0
    assert not known.cut_off("flood")


def test_who_pauses_is_not_cut_off(clock: list[float]) -> None:
    known = Conduct()
    for _ in range(20):
        refuse(known, "clumsy", 2 * FREE_REFUSALS)
        clock[0] += conduct.CUT_AFTER
    assert not known.cut_off("clumsy")


def test_all_is_forgiven_in_time(clock: list[float]) -> None:
    known = Conduct()
    refuse(known, "flood", 10 * MOST_REFUSALS)
    clock[0] += 40.0
    assert waited(known, "flood", clock) == 0.0
    clock[0] += 40.0
    assert known.refusals("flood") == 0.0


def test_what_begins_at_once_is_heard_one_after_the_other_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conduct, "LATE_SECONDS", 0.01)
    monkeypatch.setattr(conduct, "LONGEST_TURN", 0.3)
    monkeypatch.setattr(conduct, "FORGIVEN_PER_SECOND", 0.0)

    async def main() -> None:
        known = Conduct()
        refuse(known, "flood", FREE_REFUSALS + 10)
        turns = await asyncio.gather(
            *(known.turn("flood") for _ in range(8)), return_exceptions=True
        )
        assert [type(turn) for turn in turns] == [type(None)] * 3 + [ServerBusy] * 5

    asyncio.run(main())


def test_an_honest_exchange_is_no_offence(clock: list[float]) -> None:
    known = Conduct()
    for _ in range(1000):
        known.refused("a notebook", CacheFull("no room"))
    assert known.refusals("a notebook") == 0.0
    for _ in range(int(FREE_REFUSALS)):
        known.refused("a notebook", ServerBusy("later"))
    assert waited(known, "a notebook", clock) == 0.0


def test_what_was_read_for_nothing_counts(clock: list[float]) -> None:
    known = Conduct()
    known.refused("flood", WRONG, read=int(FREE_REFUSALS) << 20)
    assert waited(known, "flood", clock) > 0.0


def test_many_peers_take_no_memory_and_the_worst_are_remembered(clock: list[float]) -> None:
    known = Conduct()
    refuse(known, "flood", MOST_REFUSALS)
    for number in range(3 * MAX_PEERS):
        known.refused(f"peer {number}", WRONG)
    assert known.refusals("flood") == MOST_REFUSALS
    assert len(known._records) <= MAX_PEERS
