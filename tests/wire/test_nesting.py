"""Tuples inside of tuples, which hivemind's decoder would follow until the process ends."""

from __future__ import annotations

import time
from typing import Any

import msgpack
import pytest
import torch
from hivemind.dht.node import DHTID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer
from support.bench import Bench
from support.raw_wire import request

from swarm_notebook.net.p2p.fixes import MAX_DEPTH
from swarm_notebook.net.wire import protocol

# Eight times what overflows the stack, and as large as a record may be.
DEEP = 1600
TUPLE = 0x40


def nested(depth: int) -> bytes:
    packed: bytes = msgpack.packb(None)
    for _ in range(depth):
        packed = msgpack.packb(msgpack.ExtType(TUPLE, b"\x91" + packed))
    return packed


def test_what_is_deep_stays_bytes() -> None:
    found: Any = MSGPackSerializer.loads(nested(DEEP))
    for _ in range(MAX_DEPTH):
        (found,) = found
    assert found == nested(DEEP)[-len(found) :]
    value: Any = MSGPackSerializer.loads(nested(MAX_DEPTH))
    for _ in range(MAX_DEPTH):
        (value,) = value
    assert value is None


def test_a_request_does_not_end_a_server(llama: Bench) -> None:
    uid = protocol.uid_chain("tiny-llama", llama.start, llama.end)
    message = request(uid, torch.ones(1, 1, 48))
    message.metadata = protocol.pack_metadata({"x": 0})[:-1] + nested(DEEP)
    (answer,) = llama.client.run(llama.client.forward(llama.server.peer, message))
    assert answer.shape == (1, 1, 48)
    assert llama.client.run(llama.client.info(llama.server.peer))["version"]


@pytest.mark.parametrize("where", ["value", "subkey"])
def test_a_record_ends_neither_a_server_nor_who_reads_it(llama: Bench, where: str) -> None:
    name, bomb = MSGPackSerializer.dumps("name"), nested(DEEP)
    value, subkey = (bomb, name) if where == "value" else (name, bomb)
    dht = llama.client.node.dht
    record = dht_pb2.StoreRequest(
        keys=[DHTID.generate(source=where).to_bytes()],
        subkeys=[subkey],
        values=[value],
        expiration_time=[time.time() + 60],
        in_cache=[False],
    )

    async def main() -> None:
        await dht.protocol.get_stub(llama.server.peer).rpc_store(record)
        found = await dht.get(where, latest=True)
        # A name that is no text is not kept.
        assert (found is not None and list(found.value)) == (where == "value" and ["name"])

    llama.client.run(main())
    assert llama.client.run(llama.client.info(llama.server.peer))["version"]
