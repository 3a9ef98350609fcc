"""Who is avoided, why, and for how long."""

from __future__ import annotations

import time

from swarm_notebook.client.servers.health import (
    BAN_SECONDS,
    FAILING,
    FORGIVABLE_FAILURES,
    UNREACHABLE,
    WRONG,
    Fault,
    PeerHealth,
)

PINGED = 12345.0


def fail_often(health: PeerHealth) -> None:
    for _ in range(FORGIVABLE_FAILURES + 2):
        health.failed("peer", "it fails")


def fault(health: PeerHealth) -> Fault:
    found = health.fault("peer", PINGED)
    assert found is not None
    return found


def test_a_server_that_was_away_and_answers_again_is_used_at_once() -> None:
    health = PeerHealth()
    fail_often(health)
    health.silent("peer")
    assert fault(health) == Fault(UNREACHABLE, "it fails", PINGED)
    health.answered("peer")
    assert health.fault("peer", PINGED) is None


def test_a_server_that_pings_well_and_works_badly_stays_avoided() -> None:
    health = PeerHealth()
    fail_often(health)
    health.answered("peer")
    found = fault(health)
    assert (found.kind, found.reason) == (FAILING, "it fails")
    assert found.retry is not None
    assert found.retry > time.monotonic() + BAN_SECONDS


def test_each_kind_of_fault_is_called_by_its_name() -> None:
    health = PeerHealth()
    health.silent("peer")
    assert fault(health) == Fault(UNREACHABLE, "it does not answer", PINGED)
    health.silent("peer", "it answers pings with rubbish")
    assert fault(health) == Fault(FAILING, "it answers pings with rubbish", PINGED)
    health.answered("peer")
    health.failed("peer", "it is gone", gone=True)
    assert fault(health).kind == UNREACHABLE
    # An answered ping forgives it sooner than the time is over, if one comes before.
    until = fault(health).retry
    assert until is not None
    sooner = health.fault("peer", until - 1)
    assert sooner is not None
    assert sooner.retry == until - 1
    health.wrong["peer"] = "by others"
    assert fault(health) == Fault(WRONG, "by others", None)
