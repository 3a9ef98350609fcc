"""How near `sn.plan` comes to swarms that run; prints a JSON line per swarm.

    python benchmarks/plan.py [--threads N] [--models demo tiny] [--servers 1 2]
                              [--weights float32 bfloat16 4.5]

In turns of some tokens, this machine is measured and a swarm of it generates: a machine whose
speed changes is the same for both then. Of either the fastest quarter counts, as other programs
only ever make something slower. The servers of one machine take turns, so a plan of several is one
of that many machines like this one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import tiny_llama

CONTEXT, NEW_TOKENS, TURNS = 128, 16, 6
PROMPT_TOKENS = 512
LOOPBACK = "0.3ms:1GB/s"
PARTS = ("compute", "queue", "network", "serialisation")


def quick(values: Sequence[float]) -> float:
    """Where the fastest quarter ends."""
    return statistics.quantiles(values, n=4)[0] if len(values) > 1 else values[0]


def measured(model: Any, servers: int, threads: int, weights: str) -> tuple[Any, Any, Any]:
    """This machine, and the passes of tokens and of prompts of a swarm of it."""
    import torch

    import swarm_notebook as sn
    from swarm_notebook.planning.measure import this_machine

    how: dict[str, Any] = {"bits": float(weights)} if weights[0].isdigit() else {"dtype": weights}
    machines, tokens, prompts = [], [], []
    with (
        sn.LocalSwarm(model, servers, threads=threads, **how) as local,
        sn.connect(local.initial_peers, model=local.model) as swarm,
    ):
        options = {"do_sample": False, "pad_token_id": 0}
        more = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, **options}
        ids = torch.randint(3, 1000, (1, CONTEXT // 2))
        swarm.model.generate(ids, **more)
        for _ in range(TURNS):
            machines.append(this_machine())
            swarm.model.generate(ids, **more)
            tokens += swarm.trace().passes[1:]
            prompt = torch.randint(3, 1000, (1, PROMPT_TOKENS))
            swarm.model.generate(prompt, max_new_tokens=1, **options)
            prompts.append(swarm.trace().passes[0])
    here = replace(
        machines[0],
        bandwidth=1 / quick([1 / one.bandwidth for one in machines]),
        operations=1 / quick([1 / one.operations for one in machines]),
        block_seconds=quick([one.block_seconds for one in machines]),
    )
    return here, tokens, prompts


def compared(name: str, model: Any, servers: int, threads: int, weights: str) -> dict[str, Any]:
    """What was planned and what was measured."""
    import swarm_notebook as sn
    from swarm_notebook.planning.placement import hop_seconds

    here, tokens, prompts = measured(model, servers, threads, weights)
    bits = {"float32": None, "bfloat16": 16.0}.get(weights) or (
        float(weights) if weights[0].isdigit() else None
    )
    plan = sn.plan(model, [here], context=CONTEXT, link=LOOPBACK, bits=bits)
    long = sn.plan(model, [here], context=PROMPT_TOKENS, link=LOOPBACK, bits=bits)
    hops = (servers - 1) * hop_seconds(plan.shape, plan.link, 1)
    expected = 1 / plan.tokens_per_second + hops
    first = long.first_token_seconds + (servers - 1) * hop_seconds(
        plan.shape, plan.link, PROMPT_TOKENS
    )
    found = quick([one.seconds for one in tokens])
    found_first = quick([one.seconds for one in prompts])

    def parts(passes: Any) -> dict[str, float]:
        told = {part: quick([one.part(part) for one in passes]) for part in PARTS}
        told["client"] = quick([one.client for one in passes])
        return {part: round(1000 * seconds, 2) for part, seconds in told.items()}

    return {
        "model": name,
        "servers": servers,
        "weights": weights,
        "token_ms": [round(1000 * expected, 2), round(1000 * found, 2)],
        "planned_by_measured": round(expected / found, 3),
        "first_token_ms": [round(1000 * first, 1), round(1000 * found_first, 1)],
        "first_planned_by_measured": round(first / found_first, 3),
        "machine": [here.bandwidth, here.operations, here.block_seconds],
        "planned_ms": {k: round(1000 * v, 2) for k, v in plan.parts.items()},
        "measured_ms": parts(tokens),
        "measured_first_ms": parts(prompts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--models", nargs="+", default=["demo", "tiny"])
    parser.add_argument("--servers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--weights", nargs="+", default=["float32"])
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        tiny, _ = tiny_llama(Path(folder))
        for name in options.models:
            for weights in options.weights:
                for servers in options.servers:
                    model = None if name == "demo" else tiny
                    found = compared(name, model, servers, options.threads, weights)
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
