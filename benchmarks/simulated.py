"""How near the simulator comes to real processes; prints a JSON line per swarm and link.

    python benchmarks/simulated.py [--layouts 3 6 3+3] [--profiles lan city]

Servers and notebooks of the demo model run in network namespaces of their own, with links between
any two of them as `links` makes them. Each notebook has some conversations one after the other, at
the same time as the others. The same is simulated, on the chains that the notebooks have taken: by
what this machine reaches, measured before and after, and by the link. ``3+3`` is two notebooks and
two chains of three servers.

Told are milliseconds of a token and of the first one, after its prompt, each simulated, measured,
and as a ratio; 1 is the aim. Of what is measured the fastest quarter counts, as other programs only
ever make something slower. Takes root.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import be_quiet, say, summary
from distance import build, in_line, start
from links import PROFILES, Machines
from links import Link as Wire
from plan import quick

PROMPT_TOKENS, NEW_TOKENS, TURNS = 128, 24, 8
MEASUREMENTS = 4  # of the machine, before and after
LAYOUTS = {"3": (3, 1), "6": (6, 1), "3+3": (3, 2)}  # servers in a chain; chains, and notebooks


def main() -> None:
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument(
        "--profiles", nargs="+", choices=PROFILES, default=["lan", "city", "continent"]
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    be_quiet(threads=1)
    if options.child:
        model, *peers = options.child
        child(model, peers)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    for layout in options.layouts:
        count, chains = LAYOUTS[layout]
        with (
            tempfile.TemporaryDirectory() as folder,
            Machines(count * chains + chains) as machines,
            ExitStack() as ends,
        ):
            model = build("demo", Path(folder))
            spans = in_line(model, count) * chains
            peers = start(machines, model, spans, Path(folder), ends, "--dtype", "float32")
            # The first machine is a notebook's, and those behind the servers.
            notebooks = [0, *range(len(spans) + 1, len(spans) + chains)]
            for name in options.profiles:
                found = compared(machines, notebooks, model, peers, PROFILES[name])
                print(json.dumps({"layout": layout, "link": name} | found), flush=True)


def compared(
    machines: Machines, notebooks: list[int], model: str, peers: list[str], wire: Wire
) -> dict[str, Any]:
    """What was simulated and what was measured over such links."""
    say(f"{wire}, load {os.getloadavg()[0]:.1f} …")
    machines.switch.link = wire
    command = [sys.executable, __file__, "--child", model, *peers]
    working = [
        subprocess.Popen(
            machines.command(one, *command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for one in notebooks
    ]
    told = [[tuple(hop) for hop in json.loads(_line(one))] for one in working]
    before = [measured_machine() for _ in range(MEASUREMENTS)]
    for one in working:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    found = [json.loads(_line(one)) for one in working]
    for one in working:
        one.communicate()
    here = fastest([*before, *(measured_machine() for _ in range(MEASUREMENTS))])
    expected = simulated(model, here, wire, told)
    report: dict[str, Any] = {"machine": [here.bandwidth, here.operations, here.block_seconds]}
    for what in ("token_ms", "first_token_ms"):
        real = statistics.mean(one[what] for one in found)
        report[what] = [round(expected[what], 2), round(real, 2), round(expected[what] / real, 3)]
    return report


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a notebook ended")
    return line


def measured_machine() -> Any:
    import torch

    from swarm_notebook.planning.measure import this_machine

    torch.set_num_threads(1)
    return this_machine()


def fastest(machines: list[Any]) -> Any:
    return replace(
        machines[0],
        bandwidth=1 / quick([1 / one.bandwidth for one in machines]),
        operations=1 / quick([1 / one.operations for one in machines]),
        block_seconds=quick([one.block_seconds for one in machines]),
    )


def simulated(model: str, here: Any, wire: Wire, told: list[Any]) -> dict[str, float]:
    """The same conversations in simulated time; milliseconds.

    Args:
        told: the chains that the notebooks have taken, of `child`.
    """
    from swarm_notebook.planning.machines import Link
    from swarm_notebook.planning.placement import Share
    from swarm_notebook.planning.shape import read_shape
    from swarm_notebook.planning.simulation import Simulation

    link = Link(2 * wire.mean_delay, wire.rate or 1e9)
    chains = {f"notebook-{number}": chain for number, chain in enumerate(told)}
    simulation = Simulation(
        read_shape(model), lambda _one, _other: link, lambda name, _: chains[name], here
    )
    for name, begin, end in {hop for chain in told for hop in chain}:
        simulation.add(name, Share(here, begin, end, 32.0, 0, 0))
    for name in chains:
        simulation.open(name, PROMPT_TOKENS, NEW_TOKENS)
    simulation.run(1000.0)
    times = [simulation.tokens[name][: NEW_TOKENS * TURNS] for name in chains]
    first, last = (statistics.mean(one[at] for one in times) for at in (0, NEW_TOKENS - 1))
    return {
        "token_ms": 1000 * (last - first) / (NEW_TOKENS - 1),
        "first_token_ms": 1000 * first,
    }


def child(model: str, peers: list[str]) -> None:
    """A notebook: says its chain, waits for a line, has its conversations, says how long."""
    import torch

    import swarm_notebook as sn

    torch.set_num_threads(1)
    more = {"min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with sn.connect(peers, model=model) as swarm:
        draw = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, 1000, (TURNS + 1, 1, PROMPT_TOKENS), generator=draw)
        swarm.model.generate(prompts[-1], max_new_tokens=NEW_TOKENS, **more)
        chain = [(hop.peer_id, hop.start, hop.end) for hop in swarm.route().hops]
        print(json.dumps(chain), flush=True)
        sys.stdin.readline()
        tokens, first = [], []
        for prompt in prompts[:TURNS]:
            swarm.model.generate(prompt, max_new_tokens=NEW_TOKENS, **more)
            first_pass, *others = swarm.trace().passes
            first.append(1000 * first_pass.seconds)
            tokens += [1000 * one.seconds for one in others]
    print(json.dumps({"token_ms": quick(tokens), "first_token_ms": quick(first)}), flush=True)


if __name__ == "__main__":
    main()
