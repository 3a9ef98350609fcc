"""Sockets to the network daemon that are dropped, and freed by another thread."""

from __future__ import annotations

import subprocess

from support.forkserver import WARM

# Streams that are dropped in circles while bytes arrive, and a main thread that collects garbage:
# with asyncio's own writers the process died in three of five runs of 60 rounds.
DROPPING = """
import faulthandler, gc, warnings
faulthandler.enable()
warnings.simplefilter("ignore")
from hivemind.proto import runtime_pb2
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.client.loop import LoopThread
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire.stream_server import add_stream_handler
from swarm_notebook.net.wire.opening import open_stream

async def flood(stream, peer):
    while True:
        await stream.send(PackedMessage(metadata=bytes(1 << 16)))

async def start():
    server = await Node.start(client=False)
    client = await Node.start(await server.addresses(), client=True)
    await add_stream_handler(server.p2p, "Test.flood", flood)
    return server, client

async def drop(server, client):
    for _ in range(4):
        stream = await open_stream(client.p2p, server.peer_id, "Test.flood")
        await stream.receive()
        circle = [stream]
        circle.append(circle)

thread = LoopThread()
server, client = thread.run(start())
gc.collect()
gc.freeze()
for _ in range(150):
    thread.run(drop(server, client))
    gc.collect()
    gc.collect()
thread.run(client.stop())
thread.run(server.stop())
print("alive")
"""


def test_a_collector_in_another_thread_is_no_danger() -> None:
    command = [*WARM, DROPPING]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "alive", done.stderr[-3000:]
