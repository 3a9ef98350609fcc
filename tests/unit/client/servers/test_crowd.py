"""Notebooks spread over servers that are alike, keep to them, and leave those that are busy."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from swarm_notebook.client.servers.crowd import ALIKE, Crowd
from swarm_notebook.client.servers.kept import DECIDE_SECONDS, KeptChain
from swarm_notebook.client.servers.routing import Links, RouteSegment, best_chain, token_seconds
from swarm_notebook.net.dht.records import ServerInfo, ServerSpan

BLOCKS, RTT = 10, 0.002


def server(
    peer: str, rps: float, start: int = 0, end: int = BLOCKS, *, many: float | None = None
) -> ServerSpan:
    info = ServerInfo(state=2, throughput=rps, inference_rps=rps, forward_rps=many)
    return ServerSpan(peer, start, end, info)


class Notebook:
    """One that knows how busy servers are, and opens a session when it is asked to."""

    def __init__(self, name: str = "me", draws: Sequence[float] = (), known: str = ""):
        self.now, drawn = 0.0, random.Random(name)
        given = iter(draws)
        self.crowd = Crowd(name)
        self._chain = KeptChain(
            self.crowd,
            lambda span: bool(known) and span.peer != known,
            (lambda: next(given)) if draws else drawn.random,
            lambda: self.now,
        )

    def hears(self, rates: dict[str, float]) -> None:
        """Ten seconds later, so many requests of others per second were answered."""
        for peer, rate in rates.items():
            self.crowd.forget(peer)
            for seconds in (0.0, 100.0):
                self.crowd.told(peer, int(rate * seconds), 0, seconds)
        self.now += DECIDE_SECONDS

    def opens(self, servers: list[ServerSpan]) -> list[RouteSegment]:
        links = Links({one.peer: RTT for one in servers}, lambda _one, _other: True)
        return self._chain.choose(servers, 0, BLOCKS, links)

    def looks(self, servers: list[ServerSpan]) -> list[str]:
        links = Links({one.peer: RTT for one in servers}, lambda _one, _other: True)
        return [one.peer for one in self._chain.expected(servers, 0, BLOCKS, links)]

    def peers(self, servers: list[ServerSpan]) -> list[str]:
        return [one.peer for one in self.opens(servers)]


@pytest.mark.parametrize("servers", [2, 3, 4])
@pytest.mark.parametrize("every", [1, 2], ids=["one after the other", "others come between"])
@pytest.mark.parametrize("notebooks", [3, 10, 60])
def test_those_that_come_spread_over_servers_that_are_alike(
    servers: int, every: int, notebooks: int
) -> None:
    # As twins measure themselves: a little different.
    twins = [server(f"twin{one}", 1000.0 * (1 + ALIKE / 4 * one)) for one in range(servers)]
    took: Counter[str] = Counter()
    for number in range(notebooks):
        notebook = Notebook(f"notebook{number}")
        for one in twins:
            notebook.crowd.arrived(one.peer, every * number)
        took[notebook.peers(twins)[0]] += 1
        assert notebook.peers(twins) == notebook.peers(twins)
    share = notebooks / servers
    assert all(share - 2 < took[one.peer] < share + 2 for one in twins), took


def test_servers_that_do_not_number_their_notebooks_are_all_used() -> None:
    twins = [server(f"twin{number}", 1000.0) for number in range(3)]
    took = Counter(Notebook(f"notebook{number}").peers(twins)[0] for number in range(60))
    assert min(took[one.peer] for one in twins) >= 8


@pytest.mark.parametrize("rubbish", [None, "first", -1, 1 << 80, math.nan, [1]])
def test_rubbish_is_no_number(rubbish: object) -> None:
    notebook = Notebook()
    notebook.crowd.arrived("twin0", rubbish)
    assert notebook.peers([server("twin0", 1000.0), server("twin1", 1000.0)])


def test_of_those_on_one_of_two_equal_servers_half_move_and_then_nobody_does() -> None:
    # A token among many costs as much as one alone.
    servers = [server("one", 1000.0), server("other", 1000.0)]
    notebooks = [Notebook(f"notebook{number}") for number in range(200)]
    for one in notebooks:
        assert one.peers([servers[0]]) == ["one"]
    # Each of the two hundred makes a token in four seconds: two batches and the way.
    for one in notebooks:
        one.hears({"one": 49.75, "other": 0.0})
    moved = sum(one.peers(servers) == ["other"] for one in notebooks)
    assert 25 <= moved <= 100
    for one in notebooks:
        one.hears({"one": 25.0, "other": 25.0})
    assert sum(one.peers(servers) == ["other"] for one in notebooks) == moved


def test_nobody_goes_from_a_fast_server_to_a_slow_one_that_others_fill_as_well() -> None:
    # Calls take as long for many as for one, so company costs half a call.
    fast, slow = server("fast", 1200.0, many=1e6), server("slow", 1000.0, many=1e6)
    notebook = Notebook(draws=[0.0])
    assert notebook.peers([fast, slow]) == ["fast"]
    notebook.hears({"fast": 1000.0, "slow": 0.0})
    assert notebook.peers([fast, slow]) == ["fast"]
    # Who shares it with one or two others has the slow one nearly to itself.
    notebook.hears({"fast": 110.0, "slow": 0.0})
    assert notebook.peers([fast, slow]) == ["slow"]


def test_it_decides_once_for_every_news() -> None:
    servers = [server("one", 1000.0), server("other", 1000.0)]
    notebook = Notebook(draws=[0.99, 0.0])
    notebook.peers([servers[0]])
    notebook.hears({"one": 200.0, "other": 0.0})
    assert notebook.peers(servers) == ["one"]
    for _ in range(5):  # nothing new, so no draw
        assert notebook.peers(servers) == ["one"]
    notebook.hears({"one": 200.0, "other": 0.0})
    assert notebook.peers(servers) == ["other"]


def test_to_look_decides_nothing() -> None:
    servers = [server("one", 1000.0), server("other", 1000.0)]
    notebook = Notebook(draws=[0.0])
    # Before anything is kept, and when only one of them is there: nothing is kept by looking.
    assert notebook.looks([servers[0]]) == ["one"]
    assert notebook.looks([servers[1]]) == ["other"]
    assert notebook.peers([servers[0]]) == ["one"]
    notebook.hears({"one": 200.0, "other": 0.0})
    # The one draw and this news' one decision are left for the session.
    assert [notebook.looks(servers) for _ in range(5)] == [["one"]] * 5
    assert notebook.peers(servers) == ["other"]
    assert notebook.looks(servers) == ["other"]


def test_who_looks_sees_where_one_that_is_alone_will_go() -> None:
    notebook = Notebook(draws=[0.99])
    assert notebook.peers([server("slow", 1000.0)]) == ["slow"]
    both = [server("slow", 1000.0), server("fast", 3000.0)]
    assert notebook.looks(both) == ["fast"]
    assert notebook.looks([both[0]]) == ["slow"], "it has not moved"


def test_who_is_alone_goes_to_what_is_faster_at_once() -> None:
    notebook = Notebook(draws=[0.99])
    assert notebook.peers([server("slow", 1000.0)]) == ["slow"]
    assert notebook.peers([server("slow", 1000.0), server("fast", 3000.0)]) == ["fast"]
    assert notebook.peers([server("slow", 1000.0)]) == ["slow"], "the fast one has gone"


def test_busy_servers_that_stay_are_asked_for_the_same_blocks() -> None:
    first, last = server("first", 1000.0, 0, 6, many=1e6), server("last", 1000.0, 4, 10, many=1e6)
    notebook = Notebook(draws=[0.0])
    cut = notebook.opens([first, last])
    assert [one.peer for one in cut] == ["first", "last"]
    # Another one has only a part of what the first one is asked for, and is much faster.
    other = server("other", 50_000.0, 0, cut[0].end - 1, many=1e6)
    notebook.hears({"first": 50.0, "last": 50.0, "other": 0.0})
    assert notebook.opens([first, last, other]) == cut
    # This one has all of it.
    other = server("other", 50_000.0, 0, cut[0].end, many=1e6)
    notebook.hears({"first": 50.0, "last": 50.0, "other": 0.0})
    found = notebook.opens([first, last, other])
    assert [(one.peer, one.start) for one in found] == [("other", 0), ("last", cut[0].end)]


def test_its_own_requests_and_a_restart_make_nobody_busy() -> None:
    crowd = Crowd("me")
    crowd.told("peer", 100, 100, 0.0)
    crowd.told("peer", 500, 500, 10.0)
    assert crowd.rate("peer") == 0.0
    crowd.told("peer", 1000, 500, 20.0)
    assert crowd.rate("peer") == pytest.approx(50.0)
    crowd.told("peer", 3, 0, 30.0)
    assert crowd.rate("peer") == 0.0


@pytest.mark.parametrize("rubbish", [None, "many", -1, 1 << 80, math.nan, [1]])
def test_rubbish_is_no_load(rubbish: object) -> None:
    crowd = Crowd("me")
    crowd.told("peer", 10, 0, 0.0)
    crowd.told("peer", rubbish, 0, 10.0)
    assert crowd.rate("peer") == 0.0


def test_of_servers_that_are_alike_one_that_was_audited_is_taken() -> None:
    servers = [server("known", 1000.0), server("stranger", 1000.0), server("faster", 1300.0)]
    for number in range(30):
        notebook = Notebook(f"notebook{number}", known="known")
        assert notebook.peers(servers[:2]) == ["known"]
        assert notebook.peers(servers) == ["faster"]


def test_what_is_expected_counts_those_that_one_waits_for() -> None:
    one = server("peer", 1000.0, many=10_000.0)
    chain = best_chain([one], 0, BLOCKS, Links({"peer": RTT}))
    alone = sum(token_seconds(chain, Links({"peer": RTT})))
    # Always busy, with four at a time: half a call, and for each block four tokens among many.
    busy = sum(token_seconds(chain, Links({"peer": RTT}, busy={"peer": 400.0})))
    assert busy - alone == pytest.approx(0.005 + BLOCKS * 4 / 10_000)


def test_who_takes_many_at_once_stays_the_faster_one_for_a_crowd() -> None:
    # A step of the fast server takes 0.5 ms, and one more token in it a tenth of that.
    fast, slow = server("fast", 2000.0, many=20_000.0), server("slow", 1000.0)
    rate = 2000.0 / BLOCKS
    for load, expected in ((0.5, "fast"), (4, "fast"), (40, "slow")):
        links = Links({"fast": RTT, "slow": RTT}, busy={"fast": load * rate})
        assert best_chain([fast, slow], 0, BLOCKS, links)[0].peer == expected, load
