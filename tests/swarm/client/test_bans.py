"""A server that has failed often is used again when nobody else has its blocks."""

from __future__ import annotations

from pathlib import Path

from support.patience import within
from support.scene import generate, scene

from swarm_notebook.client.servers.health import FORGIVABLE_FAILURES, PeerHealth
from swarm_notebook.errors import ServerGone

# Longer than patience, as bans of a minute are longer than the thirty seconds of a real one.
PATIENCE, FAILURES = 20.0, FORGIVABLE_FAILURES + 3


def test_a_ban_is_not_longer_than_patience(tiny_llama: Path) -> None:
    with scene(tiny_llama, [(0, 5)], hosted=True) as made:
        directory = made.swarm.connection.directory
        peer, directory.patience = made.local.servers[0].peer_id, PATIENCE
        for _ in range(FAILURES):
            directory.failed(peer, ServerGone("it was away"))
        assert directory.avoided(peer)
        ids = made.ids(1, 5)
        with within(PATIENCE):
            made.same(generate(made.remote, ids), generate(made.reference, ids))
        assert not directory.avoided(peer)


def test_a_chance_comes_once_and_silence_is_forgiven_with_it() -> None:
    health = PeerHealth()
    for _ in range(FAILURES):
        health.failed("peer", "it lies")
    assert health.give_chance("peer")
    assert health.fault("peer", 0.0) is None
    health.failed("peer", "it lies")
    assert not health.give_chance("peer")
    health.silent("peer")
    assert not health.give_chance("peer")
    # It was away and is back, so its failures may have been those of its absence.
    health.answered("peer")
    assert health.fault("peer", 0.0) is None
