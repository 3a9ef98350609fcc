"""Ten notebooks, each a process of its own, over equal servers."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch
from support.forkserver import WARM
from support.raw_wire import ServerProcess
from support.scene import generate
from transformers import AutoModelForCausalLM

NOTEBOOKS, SERVERS = 10, 2
# Equal, whatever else the machine does, and so slow that round trips do not matter.
PROGRAM = """
from swarm_notebook.cli import main
from swarm_notebook.server.engine.throughput import RateMeter, Throughput
RateMeter.rates = property(lambda _: Throughput(2.0, 2000.0))
main()
"""
NOTEBOOK = """
import json, sys
import torch
import swarm_notebook as sn
from support.scene import generate
folder, *peers = sys.argv[1:]
with sn.connect(peers, model=folder) as swarm:
    tokens = generate(swarm.model, torch.arange(3, 12)[None]).sequences.tolist()
    print(json.dumps([[hop.peer_id for hop in swarm.route().hops], tokens]), flush=True)
    sys.stdin.readline()
"""


class EqualServer(ServerProcess):
    program = (*WARM[1:], PROGRAM)


def test_ten_notebooks_spread_over_equal_servers(tiny_llama: Path, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    expected = generate(reference, torch.arange(3, 12)[None]).sequences.tolist()
    with ExitStack() as stack:
        peers: list[str] = []
        for number in range(SERVERS):
            joining = ["--initial-peers", *peers] if peers else []
            server = EqualServer(tiny_llama, tmp_path / f"{number}.log", *joining)
            stack.callback(server.kill)
            server.wait_ready()
            peers += server.facts["maddrs"]
        notebooks = []
        for _ in range(NOTEBOOKS):
            notebooks.append(
                stack.enter_context(
                    subprocess.Popen(
                        [*WARM, NOTEBOOK, str(tiny_llama), *peers],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                )
            )
            stack.callback(notebooks[-1].kill)
        told = [json.loads(notebook.stdout.readline()) for notebook in notebooks]
        for notebook in notebooks:
            notebook.stdin.close()
    assert [tokens for _, tokens in told] == [expected] * NOTEBOOKS
    assert all(len(route) == 1 for route, _ in told)
    counts = Counter(peer for route, _ in told for peer in route)
    assert len(counts) == SERVERS
    # By chance alone it would be eight of one, or worse, in one of nine runs.
    assert max(counts.values()) <= 7, counts
