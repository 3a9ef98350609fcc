"""Peers whose clocks differ."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

import pytest
from hivemind.dht import protocol as dht_protocol
from hivemind.utils import get_dht_time

from swarm_notebook.errors import ClocksDiffer
from swarm_notebook.net.node import Node

# Set for the tasks of the peer that joins, and not for those of the other one, which are older.
_joins: ContextVar[bool] = ContextVar("joins", default=False)


async def _join(seconds: float, client: bool, patch: pytest.MonkeyPatch) -> bool:
    """Whether a peer whose clock is ``seconds`` ahead finds what another one has stored."""
    server = await Node.start(client=False)
    try:
        await server.dht.store("key", 1, get_dht_time() + 120, subkey="name")

        def clock() -> float:
            return get_dht_time() + (seconds if _joins.get() else 0.0)

        patch.setattr(dht_protocol, "get_dht_time", clock)
        _joins.set(True)
        node = await Node.start(await server.addresses(), client=client)
        try:
            return (await node.dht.get("key")) is not None
        finally:
            await node.stop()
    finally:
        await server.stop()


@pytest.mark.parametrize("client", [True, False])
@pytest.mark.parametrize("seconds", [-30.0, 30.0])
def test_half_a_minute_is_no_harm(
    seconds: float, client: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asyncio.run(_join(seconds, client, monkeypatch))


@pytest.mark.parametrize(("seconds", "said"), [(90.0, "90 s ahead of"), (-3600.0, "3600 s behind")])
@pytest.mark.parametrize("client", [True, False])
def test_more_is_said_in_words(
    seconds: float, said: str, client: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClocksDiffer, match=f"this machine's clock is {said}"):
        asyncio.run(_join(seconds, client, monkeypatch))
