"""What the benchmarks of servers are made of: sessions without a notebook."""

from __future__ import annotations

import asyncio

import bare
import pytest
from support.scene import Scene


@pytest.fixture
def sessions(tiny_scene: Scene) -> list[bare.BareSession]:
    size = tiny_scene.reference.config.hidden_size
    connection = tiny_scene.swarm._connection
    return [bare.BareSession(connection, size, seed) for seed in (0, 0, 1)]


def test_they_tell_right_from_wrong(tiny_scene: Scene, sessions: list[bare.BareSession]) -> None:
    run = tiny_scene.swarm._connection.network.run

    async def together() -> None:
        await asyncio.gather(*(session.prefill() for session in sessions))
        await asyncio.gather(*(session.run(3) for session in sessions))

    before = bare.server_facts(tiny_scene.swarm)
    cpu = bare.cpu_seconds(tiny_scene.local)
    run(together())
    one, same, other = sessions
    bare.check([one], [same])
    with pytest.raises(SystemExit, match="differ"):
        bare.check([one], [other])
    assert [len(session.seconds) for session in sessions] == [3, 3, 3]
    assert bare.cpu_seconds(tiny_scene.local) > cpu
    after = bare.server_facts(tiny_scene.swarm)
    assert after["tokens_served"] - before["tokens_served"] == 3 * (bare.PREFILL + 3)
    for session in sessions:
        session.close()
