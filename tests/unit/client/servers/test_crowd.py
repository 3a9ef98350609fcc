"""Notebooks spread over servers that are alike, and keep away from those that are busy."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from swarm_notebook.client.servers.crowd import ALIKE, Crowd
from swarm_notebook.client.servers.routing import Links, best_chain, token_seconds
from swarm_notebook.net.dht.records import ServerInfo, ServerSpan

BLOCKS, RTT = 10, 0.002


def server(peer: str, rps: float) -> ServerSpan:
    return ServerSpan(peer, 0, BLOCKS, ServerInfo(state=2, throughput=rps, inference_rps=rps))


def chosen(crowd: Crowd, servers: list[ServerSpan]) -> str:
    links = Links({one.peer: RTT for one in servers}, crowd=crowd)
    return best_chain(servers, 0, BLOCKS, links)[0].peer


def test_those_that_come_at_once_spread_over_servers_that_are_alike() -> None:
    # As twins measure themselves: a little different.
    servers = [server(f"twin{number}", 1000.0 * (1 + ALIKE / 4 * number)) for number in range(3)]
    took = Counter(chosen(Crowd(f"notebook{number}"), servers) for number in range(60))
    assert min(took[one.peer] for one in servers) >= 8
    # The same notebook chooses the same again.
    assert len({chosen(Crowd("notebook1"), servers) for _ in range(5)}) == 1


def test_what_is_faster_is_taken_by_all_until_it_is_busy() -> None:
    fast, slow = server("fast", 1500.0), server("slow", 1000.0)
    assert {chosen(Crowd(f"notebook{one}"), [fast, slow]) for one in range(60)} == {"fast"}
    # Each makes 70 tokens per second, and learns of the others by pings.
    crowds = [Crowd(f"notebook{number}") for number in range(10)]
    took: Counter[str] = Counter()
    for crowd in crowds:
        for peer in ("fast", "slow"):
            for seconds in (0.0, 10.0):
                crowd.told(peer, int(70 * took[peer] * seconds), 0, seconds)
        took[chosen(crowd, [fast, slow])] += 1
    assert 2 <= took["slow"] <= 4


def test_its_own_requests_and_a_restart_make_nobody_busy() -> None:
    crowd = Crowd("me")
    crowd.told("peer", 100, 100, 0.0)
    crowd.told("peer", 500, 500, 10.0)
    assert crowd.load("peer", 0.01) == 0.0
    crowd.told("peer", 1000, 500, 20.0)
    assert crowd.load("peer", 0.01) == pytest.approx(0.5)
    crowd.told("peer", 3, 0, 30.0)
    assert crowd.load("peer", 0.01) == 0.0


@pytest.mark.parametrize("rubbish", [None, "many", -1, 1 << 80, math.nan, [1]])
def test_rubbish_is_no_load(rubbish: object) -> None:
    crowd = Crowd("me")
    crowd.told("peer", 10, 0, 0.0)
    crowd.told("peer", rubbish, 0, 10.0)
    assert crowd.load("peer", 1.0) == 0.0


def test_of_servers_that_are_alike_one_that_was_audited_is_taken() -> None:
    servers = [server("known", 1000.0), server("stranger", 1000.0), server("faster", 1300.0)]
    for number in range(30):
        links = Links(
            {one.peer: RTT for one in servers},
            crowd=Crowd(f"notebook{number}"),
            strange=lambda span: span.peer != "known",
        )
        assert best_chain(servers[:2], 0, BLOCKS, links)[0].peer == "known"
        assert best_chain(servers, 0, BLOCKS, links)[0].peer == "faster"


def test_what_is_expected_is_told_without_the_preference() -> None:
    one = server("peer", 1000.0)
    chain = best_chain([one], 0, BLOCKS, Links({"peer": RTT}, crowd=Crowd("me")))
    alone = token_seconds(chain, Links({"peer": RTT}))
    assert token_seconds(chain, Links({"peer": RTT}, crowd=Crowd("me"))) == alone


def test_who_takes_many_at_once_stays_the_faster_one_for_a_crowd() -> None:
    # A step of the fast server takes 0.5 ms, and one more token in it a tenth of that.
    info = ServerInfo(state=2, throughput=1.0, inference_rps=2000.0, forward_rps=20_000.0)
    fast, slow = ServerSpan("fast", 0, BLOCKS, info), server("slow", 1000.0)
    crowd = Crowd("me")
    links = Links({"fast": RTT, "slow": RTT}, crowd=crowd)
    rate = 2000.0 / BLOCKS
    for load, expected in ((0.5, "fast"), (4, "fast"), (40, "slow")):
        crowd.forget("fast")
        crowd.told("fast", 0, 0, 0.0)
        crowd.told("fast", int(load * rate * 100), 0, 100.0)
        assert best_chain([fast, slow], 0, BLOCKS, links)[0].peer == expected, load
