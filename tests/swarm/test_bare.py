"""What the benchmarks of servers are made of: sessions without a notebook."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import bare
import pytest
from support.scene import Scene, scene


@pytest.fixture
def alone(tiny_llama: Path) -> Iterator[Scene]:
    """In processes, whose times can be told from this one's."""
    with scene(tiny_llama, 2) as made:
        yield made


@pytest.fixture
def sessions(alone: Scene) -> list[bare.BareSession]:
    size = alone.reference.config.hidden_size
    connection = alone.swarm.connection
    return [bare.BareSession(connection, size, seed) for seed in (0, 0, 1)]


def test_they_tell_right_from_wrong(alone: Scene, sessions: list[bare.BareSession]) -> None:
    run = alone.swarm.connection.network.run

    async def together() -> None:
        await asyncio.gather(*(session.prefill() for session in sessions))
        await asyncio.gather(*(session.run(3) for session in sessions))

    before = bare.server_facts(alone.swarm)
    cpu = bare.cpu_seconds(alone.local)
    run(together())
    one, same, other = sessions
    bare.check([one], [same])
    with pytest.raises(SystemExit, match="differ"):
        bare.check([one], [other])
    assert [len(session.seconds) for session in sessions] == [3, 3, 3]
    assert bare.cpu_seconds(alone.local) > cpu
    after = bare.server_facts(alone.swarm)
    assert after["tokens_served"] - before["tokens_served"] == 3 * (bare.PREFILL + 3)
    for session in sessions:
        session.close()
