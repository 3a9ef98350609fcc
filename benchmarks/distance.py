"""What distance costs: tokens per second over servers that are far apart; prints one JSON line.

    python benchmarks/distance.py --profiles [lan city continent intercontinental]
    python benchmarks/distance.py [--delays 0.5 10 50 150] [--jitter MS] [--loss PERCENT]
                                  [--rate MBIT] [--servers N] [--model tiny demo]

Servers and notebook run in network namespaces of their own, with the given round trip (in
milliseconds) between any two of them, or with the delay, jitter, loss and rate of a named profile;
see `links`. Each is measured with the client routing every server's output itself, with direct
hops, and with direct hops and prompt lookup on a text that repeats itself. Next to it stands the
lower bound of a pass with direct hops: what `pass_bound` says of the links, and the same pass
without any distance, measured before and after all others. A table goes to standard error. Takes
root; about half a minute per row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import be_quiet, say, summary, tiny_llama
from links import PROFILES, Link, Machines

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.raw_wire import ServerProcess

START_SECONDS = 120
REPEATS = 3
SIZES = ("height", "width", "depth")
TEXT = "\n".join(f"    self.{size} = {size}  # {size} in mm" for size in SIZES)
PROMPT = f"{TEXT}\n{TEXT}\n{TEXT}\n    self.height = height"


def main() -> None:
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--profiles", nargs="*", choices=PROFILES, help="some of them, or all")
    parser.add_argument("--delays", nargs="+", type=float, default=[0.5, 10, 50, 150])
    parser.add_argument("--jitter", type=float, default=0.0, help="deviation, ms; see links.Link")
    parser.add_argument("--loss", type=float, default=0.0, help="percent of the packets")
    parser.add_argument("--rate", type=float, help="Mbit/s in each direction")
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--model", choices=["tiny", "demo"], default="tiny")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    be_quiet(threads=1)
    if options.child:
        model, *peers = options.child
        print(json.dumps(child(model, peers, options.tokens)))
        return
    # A benchmark that is told to end leaves no servers and no namespaces behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    with (
        tempfile.TemporaryDirectory() as folder,
        Machines(options.servers + 1) as machines,
        ExitStack() as ends,
    ):
        model = build(options.model, Path(folder))
        spans = in_line(model, options.servers)
        peers = start(machines, model, spans, Path(folder), ends)
        report = measure(machines, model, peers, options)
    print(json.dumps(report))


def build(which: str, folder: Path) -> str:
    """The model's folder; the tiny one is made, with the demo model's tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from swarm_notebook.checkpoint.files.demo import demo_model

    demo = str(demo_model())
    if which == "demo":
        return demo
    path, _ = tiny_llama(folder, vocab_size=AutoConfig.from_pretrained(demo).vocab_size)
    AutoTokenizer.from_pretrained(demo).save_pretrained(path)
    return str(path)


def in_line(model: str, count: int) -> list[tuple[int, int]]:
    """The blocks of so many servers of which each has as many."""
    from transformers import AutoConfig

    blocks = AutoConfig.from_pretrained(model).num_hidden_layers
    cuts = [blocks * index // count for index in range(count + 1)]
    return [*itertools.pairwise(cuts)]


def start(
    machines: Machines,
    model: str,
    spans: Sequence[tuple[int, int]],
    folder: Path,
    ends: ExitStack,
    *more: str,
) -> list[str]:
    """Start a server on each machine but the first; the address of the first of them."""
    servers: list[ServerProcess] = []
    peers: list[str] = []
    for index, (begin, end) in enumerate(spans):
        options = ["--blocks", f"{begin}:{end}", *more]
        options += ["--host-maddrs", f"/ip4/{machines.address(index + 1)}/tcp/0"]
        options += ["--name", f"far-{index}", *(["--initial-peers", *peers] if peers else [])]
        log, prefix = folder / f"server-{index}.log", machines.command(index + 1)
        server = ServerProcess(model, log, *options, prefix=prefix)
        ends.callback(server.kill)
        servers.append(server)
        server.wait_listening()
        peers = peers or [one for one in server.facts["maddrs"] if machines.address(1) in one]
    for server in servers:
        server.wait_ready()
    return peers


def links(options: argparse.Namespace) -> dict[str, Link]:
    """What to measure, by name."""
    if options.profiles is not None:
        return {name: PROFILES[name] for name in options.profiles or PROFILES}
    rate = options.rate * 125_000 if options.rate else None
    jitter, loss = options.jitter / 1000, options.loss / 100
    return {f"{delay:g} ms": Link(delay / 2000, jitter, loss, rate) for delay in options.delays}


def pass_bound(near: float, link: Link, *, ways: int, size: float) -> float:
    """Milliseconds that a pass takes at least in the mean, whoever carries it.

    On each way from machine to machine a message takes the delay with the mean of its jitter, and
    its bytes take their turn. If its one packet is lost, at least a round trip passes until another
    is sent in its place; TCP takes longer where nothing that follows gives the loss away (on Linux
    200 ms more), so that a measured pass may well be above this.

    Args:
        near: milliseconds of the same pass without any distance.
        ways: from the notebook, from server to server, and back.
        size: bytes of a message.
    """
    repairs = link.loss / (1 - link.loss) * 2 * link.mean_delay
    turn = size / link.rate if link.rate else 0.0
    return near + 1000 * ways * (link.mean_delay + turn + repairs)


def measure(
    machines: Machines, model: str, peers: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Every link, each in a fresh process on the first machine; without any first and last."""
    wanted, found = links(options), {}
    for name, link in {"near": Link(), **wanted, "near again": Link()}.items():
        say(f"{name}, load {os.getloadavg()[0]:.1f} …")
        machines.switch.link = link
        command = [sys.executable, __file__, "--tokens", str(options.tokens)]
        done = subprocess.run(
            machines.command(0, *command, "--child", model, *peers),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    ends = found["near"], found["near again"]
    near = {key: min(one[key] for one in ends) for key in ("direct_ms", "first_token_ms")}
    report: dict[str, Any] = {"servers": options.servers, "model": options.model, "near": ends[0]}
    report["near_again"], report["at"] = ends[1], {}
    ways = options.servers + 1
    for name, link in wanted.items():
        row = found[name]
        bound = pass_bound(near["direct_ms"], link, ways=ways, size=row["token_bytes"])
        # The pieces of a prompt follow each other, so that its bytes take their turn only once.
        whole = Link(link.delay, link.jitter, link.loss)
        first = pass_bound(near["first_token_ms"], whole, ways=ways, size=0)
        if link.rate:
            first += 1000 * row["prompt_tokens"] * row["token_bytes"] / link.rate
        report["at"][name] = {
            "link": asdict(link),
            **row,
            "bound_ms": round(bound, 1),
            "direct_to_bound": round(row["direct_ms"] / bound, 3),
            "lookup_speedup": round(row["direct_ms"] / row["lookup_ms"], 2),
            "first_token_bound_ms": round(first, 1),
        }
    say(table(report["at"]))
    return report


def table(rows: dict[str, dict[str, Any]]) -> str:
    """What was measured, for reading; milliseconds."""
    names = ("routed", "direct", "bound", "lookup", "first_token", "first_token_bound")
    head = [f"{'ms per token':16}", *(f"{name.replace('_', ' '):>18}" for name in names)]
    lines = ["".join(head)]
    for name, row in rows.items():
        lines.append(f"{name:16}" + "".join(f"{row[f'{column}_ms']:18.1f}" for column in names))
    return "\n".join(lines)


def child(model: str, peers: list[str], tokens: int) -> dict[str, float]:
    """On the notebook's machine: milliseconds per token in each mode, and of a first token."""
    import swarm_notebook as sn
    from swarm_notebook.client.servers.directory import Directory

    def apart(*_: object) -> bool:
        return False

    found: dict[str, float] = {}
    together = Directory.together
    with sn.connect(peers, model=model) as swarm:
        swarm.status()  # every server is known, and has been pinged twice
        fixed = {"chat": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
        fixed["do_sample"] = False
        texts = set()
        for mode in ("routed", "direct", "lookup"):
            Directory.together = apart if mode == "routed" else together  # type: ignore[method-assign]
            draft = {"draft": "auto"} if mode == "lookup" else {}
            times, before = [], swarm.bill()
            for _ in range(REPEATS + 1):
                began = time.perf_counter()
                texts.add(swarm.generate(PROMPT, **fixed, **draft))
                trace = swarm.trace()
                seconds = time.perf_counter() - began - trace.first_token_seconds
                times.append(1000 * seconds / (tokens - 1))
            found[f"{mode}_ms"] = round(statistics.median(times[1:]), 2)
            if mode == "direct":
                found["first_token_ms"] = round(1000 * trace.first_token_seconds, 1)
                found["prompt_tokens"] = prompt = trace.passes[0].tokens
                sent = (swarm.bill() - before).sent
                found["token_bytes"] = round(sent / (REPEATS + 1) / (prompt + tokens - 1))
            if mode == "lookup":
                found["lookup_passes"] = len(trace.passes)
        if len(texts) != 1:
            raise SystemExit("the modes differ in their outcome: a speed is meaningless")
    return found


if __name__ == "__main__":
    main()
