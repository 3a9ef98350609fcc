"""A small message that says it is a large tensor costs a server no more than its own bytes."""

from __future__ import annotations

import pytest
import torch
from support.bench import Bench
from support.memory import Peak

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.opening import open_stream

# What travels of a tensor is two copies at the most: as it came, and as a message or joined.
MEBIBYTES, COPIES = 15, 3.5
ONCE = 16 << 20  # what a server's allocator takes when it first does something
VALUES = MEBIBYTES * 2**20 // 3  # each with a scale of two bytes
NARROW = PackedTensor(
    buffer=bytes(3 * VALUES), size=(VALUES, 1), dtype="float64", compression=tensors.INT8
)
HIDDEN = tensors.pack(torch.zeros(1, 1, 48))
DUMMY = tensors.pack(torch.zeros(0))

# The strange tensor in each slot that a request has.
REQUESTS = {
    "step": (protocol.RPC_INFERENCE, [NARROW], "hidden states: shape"),
    "pass": (protocol.RPC_FORWARD_STREAM, [NARROW], "hidden states: shape"),
    "prompts": (protocol.RPC_FORWARD_STREAM, [HIDDEN, NARROW], "prompts: shape"),
    "mask": (protocol.RPC_FORWARD_STREAM, [HIDDEN, DUMMY, NARROW], "attention mask: "),
    "row ids": (protocol.RPC_INFERENCE, [HIDDEN, DUMMY, NARROW], "hypo_ids: "),
    "gradient": (protocol.RPC_BACKWARD_STREAM, [HIDDEN, NARROW], "gradient: shape"),
}


def test_a_strange_shape_is_refused_before_it_is_unpacked(llama_process: Bench) -> None:
    server, client = llama_process.server, llama_process.client
    uid = protocol.uid_chain("tiny-llama", llama_process.start, llama_process.end)

    async def ask(rpc: str, message: PackedMessage) -> None:
        stream = await open_stream(client.node.p2p, server.peer, rpc)
        try:
            await stream.send(message)
            if rpc != protocol.RPC_INFERENCE:
                await stream.send_end()
            await stream.receive()
        finally:
            stream.close()

    for name, (rpc, slots, expected) in REQUESTS.items():
        message = PackedMessage(uid=uid, tensors=slots)
        peak = Peak(server.facts["pid"])
        with pytest.raises(BadRequest, match=expected):
            client.run(ask(rpc, message))
        print(f"{name}: {peak.bytes >> 20} MiB")
        assert peak.bytes < COPIES * len(NARROW.buffer) + ONCE, name
