"""What anybody may store under the keys by which a swarm is found."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path

import msgpack
import pytest
import torch
from hivemind.dht.node import DHTID
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer
from support.hosting import HostedSwarm
from support.patience import PATIENCE
from support.raw_wire import RawClient
from support.scene import Scene
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.client.servers.routing import HOP_SECONDS
from swarm_notebook.net.dht.records import MAX_PINGS_READ, MODEL_INDEX_KEY, parse_record
from swarm_notebook.net.wire import protocol

# No msgpack, nothing at all, a descriptor without fields.
RUBBISH = [b"\xc1\xc1", b"", msgpack.packb(msgpack.ExtType(0x51, b"\x80"))]


async def store_rubbish(client: RawClient, peer: str, keys: list[str]) -> None:
    """Each kind under a name of its own, beside the servers' records."""
    record = dht_pb2.StoreRequest()
    for key in keys:
        for number, value in enumerate(RUBBISH):
            record.keys.append(DHTID.generate(source=key).to_bytes())
            record.subkeys.append(MSGPackSerializer.dumps(f"rubbish {number}"))
            record.values.append(value)
            record.expiration_time.append(time.time() + 600)
            record.in_cache.append(False)
    stub = client.node.dht.protocol.get_stub(PeerID.from_base58(peer))
    answer = await stub.rpc_store(record)
    assert all(answer.store_ok)


def test_rubbish_under_the_keys_of_a_swarm(tiny_llama: Path) -> None:
    with HostedSwarm(tiny_llama) as hosted:
        _rubbish_is_no_harm(hosted, tiny_llama)


def _rubbish_is_no_harm(local: HostedSwarm, tiny_llama: Path) -> None:
    client = RawClient(local.initial_peers)
    uids = [protocol.block_uid("tiny-llama", index) for index in range(5)]

    async def main() -> None:
        for server in local.servers:
            await store_rubbish(client, str(server.peer_id), [*uids, MODEL_INDEX_KEY])
        async with asyncio.timeout(PATIENCE):
            found = await client.node.dht.get_many(uids, sufficient_expiration_time=float("inf"))
        for uid in uids:
            assert found[uid].value["rubbish 0"].value is None
            assert len(found[uid].value) == len(RUBBISH) + 1

    try:
        client.run(main())
    finally:
        client.close()
    ids = torch.arange(3, 12)[None]
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad(), sn.connect(local.initial_peers, model=tiny_llama) as swarm:
        ours, theirs = swarm.model(ids).logits, reference(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


PING_SECONDS = 200.0  # three announcements


def test_servers_announce_how_far_their_neighbours_are(tiny_scene: Scene) -> None:
    """At least the one that came later; the notebook counts on it when it chooses a route."""
    swarm = tiny_scene.swarm
    deadline = time.monotonic() + PING_SECONDS
    while True:
        swarm.status()
        first, second = swarm.connection.directory.chain(0, 5)
        pings = [
            ping
            for one, other in ((first, second), (second, first))
            for peer, ping in (one.span.info.next_pings or {}).items()
            if peer == other.peer
        ]
        if pings:
            break
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert 0 < max(pings) < 3
    between = swarm.connection.directory.links.between(first.span, second.span)
    assert between == pytest.approx(HOP_SECONDS + max(pings) / 2)


@pytest.mark.parametrize(
    ("pings", "believed"),
    [
        ({}, True),
        ({"Qm": 0.25, "Qn": math.inf}, True),
        ({"Qm": -1.0}, False),
        ({"Qm": math.nan}, False),
        ({"Qm": "near"}, False),
        ({f"Qm{number}": 0.1 for number in range(MAX_PINGS_READ + 1)}, False),
    ],
)
def test_pings_that_make_no_sense_are_not_believed(pings: dict[str, float], believed: bool) -> None:
    record = parse_record((2, 1.0, {"next_pings": pings}))
    assert (record is not None) == believed
