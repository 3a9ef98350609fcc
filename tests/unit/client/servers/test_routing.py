"""Decisions of routing: pure, against a brute force over all chains."""

import itertools
import random

import pytest

from swarm_notebook.client.servers.routing import (
    RouteSegment,
    best_chain,
    describe_blocks,
    segment_seconds,
)
from swarm_notebook.errors import MissingBlocks
from swarm_notebook.net.records import ServerInfo, ServerSpan, ServerState


def server(peer: str, start: int, end: int, rps: float = 100.0, state: int = 2) -> ServerSpan:
    info = ServerInfo(state=state, throughput=rps, inference_rps=rps)
    return ServerSpan(peer, start, end, info)


def cost(chain: list[RouteSegment], rtt: dict[str, float]) -> float:
    return sum(segment_seconds(segment, rtt) for segment in chain)


def cheapest(spans: list[ServerSpan], end: int, rtt: dict[str, float]) -> float:
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
        costs.append(cost(segments, rtt))
    return min(costs)


@pytest.mark.parametrize("seed", range(30))
def test_finds_the_cheapest_chain(seed: int) -> None:
    rng = random.Random(seed)
    end = rng.randint(3, 6)
    spans, rtt = [server("whole", 0, end, rng.uniform(20, 400))], {"whole": rng.uniform(0, 0.2)}
    for number in range(4):
        start = rng.randrange(end)
        peer = f"peer{number}"
        spans.append(server(peer, start, rng.randint(start + 1, end), rng.uniform(20, 400)))
        rtt[peer] = rng.uniform(0, 0.2)
    chain = best_chain(spans, 0, end, rtt)
    assert [segment.start for segment in chain] == [0, *(segment.end for segment in chain[:-1])]
    assert chain[-1].end == end
    assert cost(chain, rtt) == pytest.approx(cheapest(spans, end, rtt))


def test_prefers_one_far_server_to_two_slow_trips() -> None:
    spans = [server("a", 0, 4), server("b", 4, 8), server("both", 0, 8)]
    chain = best_chain(spans, 0, 8, {"a": 0.05, "b": 0.05, "both": 0.08})
    assert [segment.peer for segment in chain] == ["both"]


def test_missing_blocks_are_named() -> None:
    spans = [server("a", 0, 3), server("b", 5, 8), server("gone", 3, 5, state=ServerState.OFFLINE)]
    with pytest.raises(MissingBlocks, match="blocks 3:5"):
        best_chain(spans, 0, 8, {})


def test_excluded_peers_are_not_used() -> None:
    spans = [server("a", 0, 4), server("b", 0, 4, rps=1)]
    assert best_chain(spans, 0, 4, {}, exclude={"a"})[0].peer == "b"


def test_blocks_are_described_in_runs() -> None:
    assert describe_blocks([3]) == "block 3"
    assert describe_blocks([5, 0, 1, 2, 6]) == "blocks 0:3, 5:7"
