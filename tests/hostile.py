"""Attacks on a server process, with an honest notebook beside them (``make hostile``).

    python tests/hostile.py [--seconds 10] [--seed 0] [ATTACK…]

A server of a tiny Llama may open 1,024 files and has a budget of 64 MiB for traffic. A notebook,
this process, generates without pause and is compared with the local model. Another process attacks
the server, one way after the other (`support.attacks`), for so many seconds and as a new peer each;
and before that, in the same way, another server of this machine, with which the notebook has
nothing to do. At the end stands a table:

- *beyond*: MiB of the server's memory that its announced budget for traffic does not explain
- *alone*: ms of a generation just before
- *elsewhere*: how much slower a generation is, in the median, while the other server is attacked:
  what the attack takes of this machine's cores
- *slowdown*: the same while the notebook's server is attacked. Two peers that compute share the
  server, so twice *elsewhere* is what is fair
- *worst*: seconds of the slowest of these
- *wrong*: tokens that differ from the local model's
- *refused*: what the server said, by kind
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hivemind.p2p import PeerID
from support.attacking import Target
from support.attacks import ATTACKS
from support.memory import Peak
from support.raw_wire import ServerProcess
from support.tiny import build

import swarm_notebook as sn
from swarm_notebook.errors import SwarmError
from swarm_notebook.net.node import Node

BUDGET, FILES, TOKENS, HIDDEN, BLOCKS = 64 << 20, 1024, 16384, 48, (0, 5)
NEW_TOKENS, BASELINE = 8, 20


class Honest:
    """A notebook that generates the same text again and again, and how long it takes."""

    def __init__(self, swarm: Any, model: Any):
        self._model, self.seconds, self.wrong, self.errors = swarm.model, [], 0, Counter[str]()
        self._ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(0))
        self._expected = self._generate(model)

    def _generate(self, model: Any) -> list[int]:
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        mask = torch.ones_like(self._ids)
        return model.generate(self._ids, attention_mask=mask, **options)[0].tolist()

    def once(self) -> None:
        began = time.perf_counter()
        try:
            found = self._generate(self._model)
        except SwarmError as error:
            self.errors[type(error).__name__] += 1
        else:
            self.wrong += sum(a != b for a, b in zip(found, self._expected, strict=True))
        self.seconds.append(time.perf_counter() - began)

    def begin(self) -> None:
        self.seconds, self.wrong, self.errors = [], 0, Counter()


async def attack(options: argparse.Namespace) -> None:
    """The attacker's process: one line in, one when a peer of its own is there, one at the end."""
    for line in sys.stdin:
        number, _, name = line.strip().partition(" ")
        address = options.addresses[int(number)]
        node = await Node.start([address], client=True)
        peer = PeerID.from_base58(address.rpartition("/")[2])
        print("begun", flush=True)
        target = Target(node, peer, options.prefix, BLOCKS, HIDDEN, options.seconds, tokens=TOKENS)
        target.random, target.address = random.Random(options.seed), address
        try:
            errors = await ATTACKS[name](target)
        except Exception as error:  # the attacker's own trouble is nobody else's
            errors = [error]
        print(json.dumps(Counter(type(error).__name__ for error in errors)), flush=True)
        await node.stop()


def serve(folder: Path, log: str) -> ServerProcess:
    """A server that may open few files, as this process may while it starts it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    try:
        options = ["--traffic-bytes", str(BUDGET), "--activation-bytes", str(16 << 20)]
        server = ServerProcess(folder, folder.parent / log, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    server.wait_ready()
    return server


def run(options: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="hostile-")) / "tiny-llama"
    model = build("llama")
    model.config.max_position_embeddings = 2 * TOKENS
    model.save_pretrained(folder)
    servers = [serve(folder, "server.log"), serve(folder, "elsewhere.log")]
    addresses = [server.facts["maddrs"][0] for server in servers]
    command = [sys.executable, __file__, "--addresses", *addresses, "--prefix", folder.name]
    command += ["--seconds", str(options.seconds), "--seed", str(options.seed)]
    attacker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        with sn.connect(addresses[:1], model=folder) as swarm:
            honest = Honest(swarm, model)
            times = f"{'alone':>5} {'elsewhere':>9} {'slowdown':>8} {'worst':>5}"
            print(f"{'attack':<40} {'beyond':>6} {times} {'wrong':>5}  refused")
            for name in options.attacks or ATTACKS:
                print(row(name, servers, attacker, honest), flush=True)
    finally:
        attacker.kill()
        for server in servers:
            server.kill()


def row(name: str, servers: list[ServerProcess], attacker: subprocess.Popen, honest: Honest) -> str:
    honest.begin()
    for _ in range(BASELINE):
        honest.once()
    alone = statistics.median(honest.seconds)
    elsewhere, _ = beside(f"1 {name}", attacker, honest)
    peak = Peak(servers[0].facts["pid"])
    slowed, told = beside(f"0 {name}", attacker, honest)
    beyond = max(0, peak.bytes - BUDGET) >> 20
    failed = f", notebook: {dict(honest.errors)}" if honest.errors else ""
    slow = f"{elsewhere / alone:>9.1f} {slowed / alone:>8.1f} {max(honest.seconds):>5.1f}"
    return f"{name:<40} {beyond:>6} {1000 * alone:>5.0f} {slow} {honest.wrong:>5}  {told}{failed}"


def beside(order: str, attacker: subprocess.Popen, honest: Honest) -> tuple[float, Any]:
    """Seconds of a generation beside an attack, in the median, and how that was refused."""
    told: list[Any] = []
    attacker.stdin.write(order + "\n")
    attacker.stdout.readline()
    waiting = threading.Thread(target=lambda: told.append(json.loads(attacker.stdout.readline())))
    waiting.start()
    honest.begin()
    while waiting.is_alive():
        honest.once()
    return statistics.median(honest.seconds), told[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("attacks", nargs="*", choices=[*ATTACKS, []], metavar="ATTACK")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--addresses", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--prefix", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.addresses:
        asyncio.run(attack(options))
    else:
        run(options)


if __name__ == "__main__":
    main()
