"""Swarms in simulated time, where one can reckon what must come out."""

from __future__ import annotations

import itertools

import pytest

from swarm_notebook.planning.machines import KNOWN, Link
from swarm_notebook.planning.placement import (
    Demand,
    Share,
    hop_seconds,
    notebook_seconds,
    prompt_seconds,
    step_seconds,
)
from swarm_notebook.planning.shape import BlockShape, ModelShape
from swarm_notebook.planning.simulation import MISSED_SECONDS, Simulation, rate_together

SHAPE = ModelShape("8", (BlockShape(200_000_000, 0, 8192, 2048),) * 8, 4096, 0, 0, None)
CARD, LINK = KNOWN["rtx4090"], Link(0.02, 125e6)
FIRST, SECOND = Share(CARD, 0, 4, 16, 0, 0), Share(CARD, 4, 8, 16, 0, 0)


def swarm() -> Simulation:
    def route(_notebook: str, _tokens: int) -> list[tuple[str, int, int]]:
        found = {host.share.start: name for name, host in reversed(made.hosts.items())}
        return [(found[0], 0, 4), (found[4], 4, 8)] if len(found) == 2 else []

    made = Simulation(SHAPE, lambda _one, _other: LINK, route, CARD)
    made.add("a", FIRST)
    made.add("b", SECOND)
    return made


def step(rows: int) -> float:
    """Seconds of a step through both servers, and of its way."""
    compute = [step_seconds(SHAPE, share, rows, 0, None) for share in (FIRST, SECOND)]
    return sum(compute) + 2 * hop_seconds(SHAPE, LINK, 1) + notebook_seconds(SHAPE, CARD, LINK)


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def test_one_stream_takes_what_a_plan_says() -> None:
    made = swarm()
    made.open("me", prompt=500, answer=20, pause=1e9)
    made.run(60.0)
    assert len(made.tokens["me"]) == 20
    assert gaps(made.tokens["me"]) == pytest.approx([step(1)] * 19)
    prompt = sum(prompt_seconds(SHAPE, share, 500) for share in (FIRST, SECOND))
    way = 2 * hop_seconds(SHAPE, LINK, 500) + notebook_seconds(SHAPE, CARD, LINK)
    assert made.tokens["me"][0] == pytest.approx(prompt + way)
    assert sum(made.answered("a").values()) == 20


def test_what_waits_together_is_one_batch() -> None:
    made = swarm()
    for number in range(16):
        made.open(f"notebook-{number}", prompt=8, answer=10_000)
    made.run(20.0)
    rate = sum(map(len, made.tokens.values())) / 20
    # Far more than one after the other, and none starves.
    assert rate > 5 / step(1)
    counts = sorted(map(len, made.tokens.values()))
    assert counts[0] > 0.8 * counts[-1]


def test_a_server_that_goes_costs_a_pause_and_no_token() -> None:
    made = swarm()
    made.open("me", prompt=100, answer=10_000)
    made.at(5.0, lambda: made.remove("b"))
    made.at(9.0, lambda: made.add("c", SECOND))
    made.run(20.0)
    longest = max(gaps(made.tokens["me"]))
    assert 4.0 < longest < 4.0 + MISSED_SECONDS
    assert set(made.answered("c")) == {"me"}
    made.at(made.now, lambda: made.add("d", FIRST))
    made.at(made.now + 1, lambda: made.remove("a", told=True))
    before = len(made.tokens["me"])
    made.run(30.0)
    assert max(gaps(made.tokens["me"][before:])) < 0.5, "it was told"


def test_streams_together_have_no_more_than_each_alone_and_no_more_than_servers_can() -> None:
    shares, context = (FIRST, SECOND), 1024

    def rate(sessions: int) -> float:
        return rate_together(SHAPE, shares, CARD, Demand(2 * context, sessions), LINK)

    def steps(rows: int) -> list[float]:
        return [step_seconds(SHAPE, share, rows, context, None) for share in shares]

    network = 2 * hop_seconds(SHAPE, LINK, 1) + notebook_seconds(SHAPE, CARD, LINK)
    alone = 1 / (sum(steps(1)) + network)
    assert rate(1) == pytest.approx(alone, rel=0.05)  # half of a token at the ends
    assert 1.5 * alone < rate(2) < 2.1 * alone
    assert rate(16) > 2 * rate(2)
    # Nobody passes more than the largest batches that there can be.
    assert rate(64) < 64 / max(steps(64))
    assert rate(2000) > rate(64)
