"""Where a server says on the local network that it is."""

from __future__ import annotations

import asyncio

import pytest

from swarm_notebook.errors import AddressError
from swarm_notebook.net.lan import Beacon, fingerprint

PEER = "12D3KooWPoyu8uRNgUVHyjj8SaSMFsyfPZNxevfc4xLP8wE7D3Cv"


@pytest.mark.parametrize(
    "addresses",
    [[], [f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"], [f"/ip6/fe80::1/tcp/4001/p2p/{PEER}"]],
)
def test_who_listens_on_this_machine_only_is_not_to_be_found(addresses: list[str]) -> None:
    with pytest.raises(AddressError, match=r"no other machine reaches this server.*--host-maddrs"):
        asyncio.run(Beacon.start(addresses, "tiny"))


def test_a_fingerprint_tells_swarms_apart() -> None:
    marks = {fingerprint(bytes([number]) * 32) for number in range(100)}
    assert len(marks) == 100
    assert fingerprint(bytes(32)) == fingerprint(bytes(32))
