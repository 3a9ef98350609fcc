"""A server takes the memory of its blocks, and of what it holds for those who are there.

Weights are mapped from the file and become resident when they are first used, so each server
computes a token before it is measured.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import closing
from pathlib import Path

import psutil
import torch
from support.forkserver import WARM
from support.patience import wait_until
from support.raw_wire import RawClient, ServerProcess, request
from support.tiny import tiny_model

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.net.wire.opening import open_stream

BLOCKS, SOME, HIDDEN = 30, (10, 15), 576
BLOCK_BYTES = 3_540_096 * 4

# Sessions of the tiny Llama, whose cache takes this much of memory; pages of 64 positions.
SESSIONS, POSITIONS = 80, 160
SESSION_BYTES = 3 * 2 * 2 * 16 * 192 * 4
# Hidden states that are pushed for a session that does not exist.
PUSHES, PUSHED = 30, torch.zeros(1, 4096, 48)
LAST_SECONDS = 3.0  # between the first pushes that are forgotten and the last ones
# Pushes have 4 s there instead of 10, and what expires is looked for ten times as often.
PROGRAM = """
from swarm_notebook.cli import main
from swarm_notebook.server import app
from swarm_notebook.server.rpc import push
app.EXPIRE_SECONDS, push.EARLY_SECONDS = 0.5, 4.0
main()
"""


class ForgetfulServer(ServerProcess):
    program = (*WARM[1:], PROGRAM)


def test_five_of_thirty_blocks_take_five_blocks_of_memory(tmp_path: Path) -> None:
    source = resolve(None)
    hosted = [(0, BLOCKS), SOME]
    servers = [
        ServerProcess(source.path, tmp_path / f"{start}.log", "--blocks", f"{start}:{end}")
        for start, end in hosted
    ]
    resident = []
    try:
        for server, blocks in zip(servers, hosted, strict=True):
            server.wait_ready()
            client = RawClient(server.facts["maddrs"])
            message = request(
                protocol.uid_chain(source.dht_prefix, *blocks), torch.randn(1, 1, HIDDEN)
            )
            client.run(client.forward(server.peer, message))
            client.close()
            resident.append(psutil.Process(server.process.pid).memory_info().rss)
    finally:
        for server in servers:
            server.kill()
    print(f"all 30 blocks: {resident[0] >> 20} MB, 5 of them: {resident[1] >> 20} MB")
    saved = (resident[0] - resident[1]) / BLOCK_BYTES
    assert 22 < saved < 30, f"{saved:.1f} blocks less in memory, expected about 25"


def test_what_a_crowd_leaves_behind_goes_back_to_the_system(tmp_path: Path) -> None:
    """One of many sessions stays; nobody will ever ask for what was pushed."""
    folder = tiny_model("llama", tmp_path)
    server = ForgetfulServer(folder, tmp_path / "server.log", "--blocks", "1:4")
    try:
        server.wait_ready()
        with closing(RawClient(server.facts["maddrs"])) as client:
            _crowds(server, client)
    finally:
        server.kill()


def _crowds(server: ServerProcess, client: RawClient) -> None:
    process, peer = psutil.Process(server.facts["pid"]), server.peer
    uid = protocol.uid_chain("tiny-llama", 1, 4)
    states = torch.randn(1, POSITIONS, 48)

    async def crowd() -> int:
        """What the server takes while all are there."""
        sessions = [await client.session(peer) for _ in range(SESSIONS)]
        for session in sessions:
            fields = {"session_id": str(uuid.uuid4()), "max_length": POSITIONS}
            await session.step(uid, states, None, None, start_from_position=0, **fields)
        stream = await open_stream(client.node.p2p, peer, protocol.RPC_PUSH_STREAM)
        for number in range(PUSHES):
            metadata = protocol.pack_metadata({"session_id": "none", "step_id": str(number)})
            pushed = [tensors.pack(PUSHED)]
            await stream.send(PackedMessage(tensors=pushed, metadata=metadata))
        peak = 0
        while (now := process.memory_info().rss) > peak:  # until all has come
            peak = now
            await asyncio.sleep(1.0)
        for session in sessions[:-1]:
            session.close()
        stream.abort()
        return peak

    held = (SESSIONS - 1) * SESSION_BYTES + PUSHES * PUSHED.nbytes
    # Arithmetic of these shapes takes some memory for good: that is not what a crowd leaves behind.
    peak = client.run(crowd())
    wait_until(lambda: peak - process.memory_info().rss > 0.9 * held, "forgetting a crowd", 0.5)
    time.sleep(LAST_SECONDS)
    before = process.memory_info().rss
    peak = client.run(crowd())
    assert peak - before > 0.9 * held
    # Not even a single push may stay.
    wait_until(
        lambda: process.memory_info().rss - before < PUSHED.nbytes, "forgetting a second one", 0.5
    )
