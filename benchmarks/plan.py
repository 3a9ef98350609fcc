"""How near `sn.plan` comes to swarms that run; prints a JSON line per swarm.

    python benchmarks/plan.py [--threads N] [--models demo tiny] [--servers 1 2]

This machine is measured, a swarm of it is planned and then run: a generation of one stream that
fills the planned context, and the time to the first token of a prompt. The servers of one machine
take turns, so a plan of several is one of that many machines like this one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

CONTEXT, NEW_TOKENS, REPEATS = 128, 64, 3
PROMPT_TOKENS = 512
LOOPBACK = "0.3ms:1GB/s"
TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}


def measured(model: Any, servers: int, threads: int) -> tuple[float, float]:
    """Tokens per second of one stream, and seconds to the first token of a prompt."""
    import torch

    import swarm_notebook as sn

    with (
        sn.LocalSwarm(model, servers, threads=threads) as local,
        sn.connect(local.initial_peers, model=local.model) as swarm,
    ):
        ids = torch.randint(3, 1000, (1, CONTEXT - NEW_TOKENS))
        options = {"do_sample": False, "pad_token_id": 0}
        more = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, **options}
        one = {"max_new_tokens": 1, **options}
        rates, firsts = [], []
        swarm.model.generate(ids, **more)
        for _ in range(REPEATS):
            began = time.perf_counter()
            swarm.model.generate(ids, **one)
            between = time.perf_counter()
            swarm.model.generate(ids, **more)
            ended = time.perf_counter()
            rates.append((NEW_TOKENS - 1) / (ended - between - (between - began)))
            prompt = torch.randint(3, 1000, (1, PROMPT_TOKENS))
            began = time.perf_counter()
            swarm.model.generate(prompt, **one)
            firsts.append(time.perf_counter() - began)
    return statistics.median(rates), statistics.median(firsts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--models", nargs="+", default=["demo", "tiny"])
    parser.add_argument("--servers", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import swarm_notebook as sn
    from swarm_notebook.planning.measure import this_machine
    from swarm_notebook.planning.placement import hop_seconds

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny-llama"
        AutoModelForCausalLM.from_config(LlamaConfig(**TINY), dtype=torch.float32).save_pretrained(
            tiny
        )
        for name in options.models:
            model = None if name == "demo" else tiny
            for servers in options.servers:
                here = this_machine()
                whole = sn.plan(model, [here], context=CONTEXT, link=LOOPBACK)
                found = measured(model, servers, options.threads)
                hops = (servers - 1) * hop_seconds(whole.shape, whole.link, 1)
                expected = 1 / (1 / whole.tokens_per_second + hops)
                long = sn.plan(model, [here], context=PROMPT_TOKENS, link=LOOPBACK)
                print(
                    json.dumps(
                        {
                            "model": name,
                            "servers": servers,
                            "planned_tokens_per_s": round(expected, 2),
                            "measured_tokens_per_s": round(found[0], 2),
                            "ratio": round(expected / found[0], 3),
                            "planned_first_token_s": round(long.first_token_seconds, 3),
                            "measured_first_token_s": round(found[1], 3),
                            "machine": [here.bandwidth, here.operations, here.block_seconds],
                            "parts_ms": {k: round(1000 * v, 2) for k, v in whole.parts.items()},
                        }
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
