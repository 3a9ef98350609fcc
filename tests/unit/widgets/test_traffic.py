"""What the swarm map makes of events."""

from __future__ import annotations

import time

import pytest

from swarm_notebook.client.telemetry import (
    Failover,
    HopBlocks,
    HopTimes,
    PassRecord,
    StepRecord,
    Telemetry,
)
from swarm_notebook.report.status import ServerRow, SwarmStatus
from swarm_notebook.widgets.map import all_online
from swarm_notebook.widgets.traffic import NotebookTraffic


def hop(name: str, start: int, end: int) -> HopTimes:
    return HopTimes(f"peer-{name}", name, start, end, 0.0, 0.001, 0.0, 0.001)


def step(ended: float, *hops: HopTimes, tokens: int = 1) -> StepRecord:
    return StepRecord(0, tokens, 2, ended - 0.1, ended, hops)


def test_the_way_of_a_step_joins_what_one_server_did() -> None:
    traffic = NotebookTraffic()
    assert traffic.route == []
    traffic.take([step(1.0, hop("a", 0, 2), hop("a", 2, 3), hop("b", 3, 5), hop("c", 4, 5))])
    assert traffic.route == [("peer-a", 0, 3), ("peer-b", 3, 4), ("peer-c", 4, 5)]


def test_a_route_through_a_server_that_is_gone_is_none() -> None:
    rows = [ServerRow("a", "peer-a", 0, 3, "online"), ServerRow("b", "peer-b", 3, 5, "unreachable")]
    status = SwarmStatus("m", 5, tuple(rows))
    assert all_online([("peer-a", 0, 3)], status)
    assert not all_online([("peer-a", 0, 3), ("peer-b", 3, 5)], status)
    assert not all_online([("peer-c", 0, 3)], status)


def test_pace_is_that_of_the_last_seconds() -> None:
    traffic = NotebookTraffic()
    assert traffic.speed(100.0) == (0.0, 0.0)
    traffic.take([step(50.0, hop("a", 0, 5), tokens=90), step(99.0, hop("a", 0, 5))])
    traffic.take([step(100.0, hop("a", 0, 5))])
    rate, seconds = traffic.speed(100.1)
    assert rate == pytest.approx(4 / 1.2)
    assert seconds == pytest.approx(0.1)
    assert traffic.speed(200.0) == (0.0, 0.0)
    assert traffic.tokens == 184


def test_a_pass_in_several_parts_counts_once() -> None:
    """Behind a block at home, or a state that a hook has changed, the same tokens go on."""
    traffic = NotebookTraffic(tokens=100)
    before = step(99.5, hop("a", 0, 2), tokens=9)
    behind = step(100.0, hop("b", 3, 5), tokens=9)._replace(began=99.8, first=False)
    traffic.take([before, behind])
    assert traffic.tokens == 100 + 18
    assert traffic.route == [("peer-a", 0, 2), ("peer-b", 3, 5)]
    assert traffic.speed(100.4) == (pytest.approx(18 / 1.0), pytest.approx(0.3))


def test_passes_without_a_cache_count_and_mend() -> None:
    """States that are collected, and training: what the bill has, the pace has."""
    traffic, now = NotebookTraffic(), time.perf_counter()
    traffic.take([Failover("peer-b", "b", 2, 5, "is gone", now)])
    hops = (HopBlocks("peer-a", "a", 0, 2), HopBlocks("peer-c", "c", 2, 5))
    traffic.take([PassRecord(7, 3, now, now + 0.5, hops, True)])
    assert traffic.tokens == 21
    assert traffic.route == [("peer-a", 0, 2), ("peer-c", 2, 5)]
    assert traffic.speed(now + 0.5)[0] == pytest.approx(42)
    assert traffic.failovers()[0][6:] == [["c"], 0.5]


def test_who_looks_later_knows_what_has_passed() -> None:
    telemetry = Telemetry()
    telemetry.passed(telemetry.begin(0.0), step(1.0, hop("a", 0, 5), tokens=9))
    with telemetry.subscribe() as late:
        assert late.before == 18
        assert late.drain() == []


def test_a_loss_is_mended_by_those_who_compute_its_blocks() -> None:
    traffic = NotebookTraffic()
    now = time.perf_counter()
    traffic.take([step(now - 1, hop("a", 0, 2), hop("b", 2, 5))])
    traffic.take([Failover("peer-b", "b", 2, 5, "is gone", now)])
    (loss,) = traffic.failovers()
    assert loss[0] == pytest.approx(time.time(), abs=5)
    assert loss[1:] == ["peer-b", "b", 2, 5, "is gone", [], None]
    assert traffic.route == [("peer-a", 0, 2), ("peer-b", 2, 5)]
    traffic.take([step(now + 0.25, hop("a", 0, 2), hop("c", 2, 4))])
    assert traffic.failovers()[0][6:] == [["c"], None]
    traffic.take([step(now + 0.5, hop("a", 0, 2), hop("c", 2, 4), hop("d", 4, 5))])
    assert traffic.failovers()[0][6:] == [["c", "d"], 0.5]
    traffic.take([step(now + 9.0, hop("e", 0, 5))])
    assert traffic.failovers()[0][6:] == [["c", "d"], 0.5]
