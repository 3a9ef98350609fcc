"""Decisions of routing: pure, against a brute force over all chains."""

import itertools
import math
import random

import pytest

from swarm_notebook.client.servers.routing import (
    ANSWER_TOKENS,
    HOP_SECONDS,
    Links,
    RouteSegment,
    Work,
    best_chain,
    block_slices,
    describe_blocks,
    network_seconds,
    token_seconds,
)
from swarm_notebook.errors import MissingBlocks
from swarm_notebook.net.dht.records import ServerInfo, ServerSpan, ServerState


def server(
    peer: str,
    start: int,
    end: int,
    rps: float = 100.0,
    state: int = 2,
    pings: dict[str, float] | None = None,
) -> ServerSpan:
    info = ServerInfo(state=state, throughput=rps, inference_rps=rps, next_pings=pings)
    return ServerSpan(peer, start, end, info)


def all_push(_sender: ServerSpan, _receiver: ServerSpan) -> bool:
    return True


def cost(chain: list[RouteSegment], links: Links) -> float:
    return sum(token_seconds(chain, links))


def cheapest(spans: list[ServerSpan], end: int, links: Links) -> float:
    """The cost of the best chain, by trying every assignment of servers to blocks."""
    choices = [[s for s in spans if s.start <= block < s.end] for block in range(end)]
    costs = []
    for assignment in itertools.product(*choices):
        segments = []
        for block, span in enumerate(assignment):
            if segments and segments[-1].span is span:
                segments[-1] = RouteSegment(span, segments[-1].start, block + 1)
            else:
                segments.append(RouteSegment(span, block, block + 1))
        costs.append(cost(segments, links))
    return min(costs)


@pytest.mark.parametrize("push", [False, True], ids=["over the notebook", "pushed"])
@pytest.mark.parametrize("seed", range(30))
def test_finds_the_cheapest_chain(seed: int, push: bool) -> None:
    rng = random.Random(seed)
    end = rng.randint(3, 6)
    peers = ["whole", *(f"peer{number}" for number in range(4))]
    spans, rtt = [], {}
    for peer in peers:
        start = rng.randrange(end) if spans else 0
        stop = rng.randint(start + 1, end) if spans else end
        # Some pings are not known, some are known to one side only, some make no sense.
        known = rng.sample(peers, rng.randint(0, 4))
        pings = {other: rng.choice([rng.uniform(0, 0.3), math.inf]) for other in known}
        spans.append(server(peer, start, stop, rng.uniform(20, 400), pings=pings))
        rtt[peer] = rng.uniform(0, 0.2)
    links = Links(rtt, lambda sender, _: push and sender.peer != "peer0")
    chain = best_chain(spans, 0, end, links)
    assert [segment.start for segment in chain] == [0, *(segment.end for segment in chain[:-1])]
    assert chain[-1].end == end
    assert cost(chain, links) == pytest.approx(cheapest(spans, end, links))


def test_prefers_one_far_server_to_two_hops_over_the_notebook() -> None:
    spans = [server("a", 0, 4), server("b", 4, 8), server("both", 0, 8)]
    chain = best_chain(spans, 0, 8, Links({"a": 0.05, "b": 0.05, "both": 0.08}))
    assert [segment.peer for segment in chain] == ["both"]


def test_hops_between_near_servers_cost_little_if_they_push() -> None:
    """The notebook is far from all; two servers are next to each other, and twice as quick."""
    near = {"b": 0.002}
    spans = [server("a", 0, 4, 200.0, pings=near), server("b", 4, 8, 200.0), server("both", 0, 8)]
    rtt = {"a": 0.1, "b": 0.1, "both": 0.1}
    pushed = Links(rtt, all_push)
    chain = best_chain(spans, 0, 8, pushed)
    assert [segment.peer for segment in chain] == ["a", "b"]
    # There, from one to the other, and back.
    assert network_seconds(chain, pushed) == pytest.approx([0.05, HOP_SECONDS + 0.001 + 0.05])
    # Kept apart, the notebook passes on what it got.
    assert [segment.peer for segment in best_chain(spans, 0, 8, Links(rtt))] == ["both"]


def test_a_ping_that_nobody_has_measured_counts_as_the_way_over_the_notebook() -> None:
    rtt = {"a": 0.02, "b": 0.04}
    chain = [RouteSegment(server("a", 0, 4), 0, 4), RouteSegment(server("b", 4, 8), 4, 8)]
    assert network_seconds(chain, Links(rtt, all_push)) == pytest.approx(
        [0.01, HOP_SECONDS + 0.03 + 0.02]
    )
    known = [chain[0], RouteSegment(server("b", 4, 8, pings={"a": 0.006}), 4, 8)]
    assert network_seconds(known, Links(rtt, all_push)) == pytest.approx(
        [0.01, HOP_SECONDS + 0.003 + 0.02]
    )
    assert network_seconds([], Links(rtt)) == []


def test_missing_blocks_are_named() -> None:
    spans = [server("a", 0, 3), server("b", 5, 8), server("gone", 3, 5, state=ServerState.OFFLINE)]
    with pytest.raises(MissingBlocks, match="blocks 3:5"):
        best_chain(spans, 0, 8, Links({}))


def test_excluded_peers_are_not_used() -> None:
    spans = [server("a", 0, 4), server("b", 0, 4, rps=1)]
    assert best_chain(spans, 0, 4, Links({}), exclude={"a"})[0].peer == "b"


def test_blocks_are_described_in_runs() -> None:
    assert describe_blocks([3]) == "block 3"
    assert describe_blocks([5, 0, 1, 2, 6]) == "blocks 0:3, 5:7"
    assert block_slices([5, 0, 1, 2, 6]) == "0:3, 5:7"


def test_a_long_prompt_goes_where_many_tokens_at_once_are_fast() -> None:
    def of(peer: str, single: float, many: float) -> ServerSpan:
        info = ServerInfo(state=2, throughput=many, inference_rps=single, forward_rps=many)
        return ServerSpan(peer, 0, 8, info)

    spans = [of("steps", 400.0, 1000.0), of("passes", 300.0, 20_000.0)]
    links = Links({"steps": 0.01, "passes": 0.01})

    def chosen(work: Work) -> str:
        return best_chain(spans, 0, 8, links, work=work)[0].peer

    assert chosen(Work()) == "steps"
    assert chosen(Work(prompt=2000, answer=0)) == "passes", "a pass without a cache"
    assert chosen(Work(prompt=20, answer=ANSWER_TOKENS)) == "steps", "a short question"
    assert chosen(Work(prompt=2000, answer=ANSWER_TOKENS)) == "passes", "a long one"
    # Each token of an answer travels: far away is only worth it for a single pass.
    far = Links({"steps": 0.01, "passes": 0.2})
    assert best_chain(spans, 0, 8, far, work=Work(500, ANSWER_TOKENS))[0].peer == "steps"
    assert best_chain(spans, 0, 8, far, work=Work(2000, 0))[0].peer == "passes"
    # For little, nobody leaves the chain that is shown.
    assert best_chain(spans, 0, 8, far, work=Work(50, 0))[0].peer == "steps"
    assert best_chain(spans, 0, 8, far, work=Work(0, 0)), "a step without positions"
