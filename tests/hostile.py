"""Attacks on a server process, with an honest notebook beside them (``make hostile``).

    python tests/hostile.py [--seconds 10] [--seed 0] [ATTACK…]

A server of a tiny Llama may open 1,024 files and has a budget of 64 MiB for traffic. A notebook,
this process, generates without pause and is compared with the local model. Another process attacks
the server, one way after the other (`support.attacks`), for so many seconds each. At the end
stands a table:

- *beyond*: MiB of the server's memory that its announced budget for traffic does not explain
- *slowdown*: of a generation, in the median, to one without an attack; two peers that compute share
  the server, so two is what is fair, and attackers take cores of this machine, too
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
from support.attacks import ATTACKS, Target
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
    """The attacker's process: one line in, an attack, one line out."""
    node = await Node.start([options.address], client=True)
    peer = PeerID.from_base58(options.address.rpartition("/")[2])
    print("ready", flush=True)
    for name in map(str.strip, sys.stdin):
        target = Target(node, peer, options.prefix, BLOCKS, HIDDEN, options.seconds, tokens=TOKENS)
        target.random = random.Random(options.seed)
        try:
            errors = await ATTACKS[name](target)
        except Exception as error:  # the attacker's own trouble is nobody else's
            errors = [error]
        print(json.dumps(Counter(type(error).__name__ for error in errors)), flush=True)
    await node.stop()


def serve(folder: Path) -> ServerProcess:
    """A server that may open few files, as this process may while it starts it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    try:
        options = ["--traffic-bytes", str(BUDGET), "--activation-bytes", str(16 << 20)]
        server = ServerProcess(folder, folder.parent / "server.log", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    server.wait_ready()
    return server


def run(options: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="hostile-")) / "tiny-llama"
    model = build("llama")
    model.config.max_position_embeddings = 2 * TOKENS
    model.save_pretrained(folder)
    server = serve(folder)
    address = server.facts["maddrs"][0]
    command = [sys.executable, __file__, "--address", address, "--prefix", folder.name]
    command += ["--seconds", str(options.seconds), "--seed", str(options.seed)]
    attacker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        attacker.stdout.readline()
        with sn.connect([address], model=folder) as swarm:
            honest = Honest(swarm, model)
            for _ in range(BASELINE):
                honest.once()
            alone = statistics.median(honest.seconds)
            print(f"alone: {1000 * alone:.0f} ms for {NEW_TOKENS} tokens\n")
            print(f"{'attack':<40} {'beyond':>6} {'slowdown':>8} {'wrong':>5}  refused")
            for name in options.attacks or ATTACKS:
                print(row(name, server, attacker, honest, alone), flush=True)
    finally:
        attacker.kill()
        server.kill()


def row(
    name: str, server: ServerProcess, attacker: subprocess.Popen, honest: Honest, alone: float
) -> str:
    peak, told = Peak(server.facts["pid"]), []
    attacker.stdin.write(name + "\n")
    waiting = threading.Thread(target=lambda: told.append(json.loads(attacker.stdout.readline())))
    waiting.start()
    honest.begin()
    while waiting.is_alive():
        honest.once()
    beyond = max(0, peak.bytes - BUDGET) >> 20
    slowdown = statistics.median(honest.seconds) / alone
    failed = f", notebook: {dict(honest.errors)}" if honest.errors else ""
    return f"{name:<40} {beyond:>6} {slowdown:>8.1f} {honest.wrong:>5}  {told}{failed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("attacks", nargs="*", choices=[*ATTACKS, []], metavar="ATTACK")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--prefix", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.address:
        asyncio.run(attack(options))
    else:
        run(options)


if __name__ == "__main__":
    main()
