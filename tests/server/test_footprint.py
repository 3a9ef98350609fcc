"""A server takes the memory of its blocks only.

Weights are mapped from the file and become resident when they are first used, so each server
computes a token before it is measured.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from raw_wire import RawClient, ServerProcess, request

from swarm_notebook.checkpoint.source import resolve
from swarm_notebook.net import protocol

BLOCKS, SOME, HIDDEN = 30, (10, 15), 576
BLOCK_BYTES = 3_540_096 * 4


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
