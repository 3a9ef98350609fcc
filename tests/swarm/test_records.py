"""What anybody may store under the keys by which a swarm is found."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgpack
import torch
from hivemind.dht.node import DHTID
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer
from support.hosting import HostedSwarm
from support.patience import PATIENCE
from support.raw_wire import RawClient
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.net import protocol
from swarm_notebook.net.records import MODEL_INDEX_KEY

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
