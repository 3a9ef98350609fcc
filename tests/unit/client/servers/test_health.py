"""Who is avoided, and for how long."""

from __future__ import annotations

from swarm_notebook.client.servers.health import FORGIVABLE_FAILURES, PeerHealth


def fail_often(health: PeerHealth) -> None:
    for _ in range(FORGIVABLE_FAILURES + 2):
        health.failed("peer", "it fails")


def test_a_server_that_was_away_and_answers_again_is_used_at_once() -> None:
    health = PeerHealth()
    fail_often(health)
    health.silent("peer")
    assert health.avoided("peer") == "it fails"
    health.answered("peer")
    assert health.avoided("peer") == ""


def test_a_server_that_pings_well_and_works_badly_stays_avoided() -> None:
    health = PeerHealth()
    fail_often(health)
    health.answered("peer")
    assert health.avoided("peer") == "it fails"
