"""What the swarm map costs the kernel with 100 servers and 126 blocks.

    python benchmarks/map.py

A directory is filled as if 100 servers had announced themselves; no network, no model. Measured: a
beat with nothing new, one with tokens that have passed, one with all facts changed (what a reading
of the swarm every 10 s brings), and how much is sent to the views for each.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from types import SimpleNamespace
from typing import Any

from hivemind.p2p import PeerID

from swarm_notebook.client.servers.directory import Directory, Snapshot
from swarm_notebook.client.telemetry import HopTimes, StepRecord, Timeline
from swarm_notebook.net.dht.records import ServerInfo, ServerSpan, ServerState
from swarm_notebook.swarm import Swarm
from swarm_notebook.widgets import SwarmMap

SERVERS, BLOCKS, ROUNDS = 100, 126, 40


def crowd() -> Directory:
    """A directory that has read the records of all servers."""
    nothing: Any = None
    directory = Directory(nothing, "big", BLOCKS)
    read(directory)
    return directory


def read(directory: Directory) -> None:
    """A new reading, with new round trips and free caches."""
    pick, spans = random.Random(0), []
    for number in range(SERVERS):
        width = pick.choice([4, 8, 12, 20, 40])
        start = pick.randint(0, BLOCKS - width)
        info = ServerInfo(
            state=ServerState.ONLINE,
            throughput=20.0,
            public_name=f"server-{number:03}.example.org",
            version="0.1.0",
            inference_rps=300.0,
            torch_dtype="bfloat16",
            quant_type="nf4",
            cache_tokens_left=random.randint(0, 8192),
            cache_tokens_total=8192,
        )
        peer = PeerID(number.to_bytes(34, "big")).to_base58()
        spans.append(ServerSpan(peer, start, start + width, info))
        directory.rtt[peer] = random.random() / 5
        directory.heard[peer] = time.time()
    directory.snapshot = Snapshot(tuple(spans), time.time())


def shown_of(directory: Directory) -> Any:
    """The map of it, which needs a kernel no more than a network."""
    connection: Any = SimpleNamespace(directory=directory, is_open=True)
    source: Any = SimpleNamespace(name="big", tokenizer=lambda: None)
    model: Any = None
    return SwarmMap(Swarm(source, model, connection, None))


def main() -> None:
    """Measure and print."""
    directory = crowd()
    shown = shown_of(directory)
    sent = [0]
    shown._send = lambda message, **_: sent.append(len(json.dumps(message["state"])))
    timeline = Timeline(time.perf_counter())

    def pass_tokens() -> None:
        spans = directory.snapshot.spans[:4]
        now = time.perf_counter()
        hops = [HopTimes(s.peer, s.name, s.start, s.end, 0, 0.01, 0, 0.01) for s in spans]
        directory.telemetry.passed(timeline, StepRecord(0, 1, 1, now - 0.02, now, tuple(hops)))

    def measure(what: str, change: Any, beat: Any) -> None:
        times, before = [], len(sent)
        for _ in range(ROUNDS):
            change()
            began = time.perf_counter()
            beat()
            times.append(time.perf_counter() - began)
        amount = sum(sent[before:]) / ROUNDS
        print(f"{what:32} {1000 * statistics.median(times):6.2f} ms {amount:8.0f} bytes")

    measure("nothing new, 4 times a second", lambda: None, shown._beat)
    measure("a token passed, 4 times a second", pass_tokens, shown._beat)
    measure("same facts, once a second", lambda: None, shown._tell_facts)
    measure("all facts new, every 10 s", lambda: read(directory), shown._tell_facts)
    steps = 20_000
    began = time.perf_counter()
    for _ in range(steps):
        pass_tokens()
    print(f"{'telling of one token':32} {1e6 * (time.perf_counter() - began) / steps:6.1f} us")
    shown.close()


if __name__ == "__main__":
    main()
