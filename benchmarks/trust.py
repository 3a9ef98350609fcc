"""What border prints and audits cost in time and bytes; prints JSON lines.

Four servers of this machine, two of each half, which hand over to each other. A notebook works
without both, with prints, and with prints and audits by turns.

*Time*: the demo model at the default rate; milliseconds per token are medians of the ratios to the
first. *Bytes* of the notebook: a model with the demo model's width and four blocks, so that there
are thousands of tokens; of all texts together, as few of them are audited. The rate is a higher one
for the same reason: `of_rate` is what audits add to prints, over the rate, and is to be 1 at most.
Servers that are new are audited in any case, which is not what a day costs: so they are audited
first.

    python benchmarks/trust.py [--rounds 7] [--tokens 64] [--threads 1] [--texts 60]
                               [--rate 0.2] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import swarm_notebook as sn
from swarm_notebook.net.wire import prints
from swarm_notebook.swarm import Swarm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.tiny import tiny_model

PROMPT_TOKENS = 512
WAYS = ("neither", "prints", "prints and audits")
SIZES = {"hidden_size": 576, "intermediate_size": 64, "num_hidden_layers": 4}


@contextmanager
def without_prints() -> Iterator[None]:
    """No server is asked for one."""
    kept = prints.new_seed
    prints.new_seed = lambda: None  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        prints.new_seed = kept


def sent(swarm: Swarm) -> int:
    """Bytes that the notebook has sent and received."""
    bill = swarm.bill()
    return bill.sent + bill.received


def generated(swarm: Swarm, way: str, ids: torch.Tensor, tokens: int) -> float:
    """Seconds of a generation, without those of audits."""
    began = time.perf_counter()
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    with without_prints() if way == WAYS[0] else ExitStack():
        swarm.model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    taken = time.perf_counter() - began
    swarm.audit(wait=600)
    return taken


@contextmanager
def swarms(model: Any, spans: list[tuple[int, int]], rate: Any, **how: Any) -> Iterator[Any]:
    """A notebook for each way, whose servers are not new to it."""
    with ExitStack() as stack:
        local = stack.enter_context(sn.LocalSwarm(model, servers=spans * 2, **how))
        yield {
            way: stack.enter_context(
                sn.connect(
                    local.initial_peers,
                    model=local.model,
                    verify=rate if way == WAYS[-1] else "off",
                )
            )
            for way in WAYS
        }


def prompts(tokens: int, largest: int) -> list[tuple[str, torch.Tensor, int]]:
    """What is asked: its name, token ids, and how many tokens are to follow."""
    ids = torch.randint(3, largest, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    return [("decode", ids[:, :8], tokens), ("chat", ids[:, :100], tokens), ("prompt", ids, 1)]


def measure_time(rounds: int, tokens: int, threads: int) -> None:
    spans = [(0, 15), (15, 30)]
    with swarms(None, spans, "spot", threads=threads) as notebooks:
        for what, ids, count in prompts(tokens, 40_000):
            found: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(rounds + 1):
                for way, swarm in notebooks.items():
                    taken = generated(swarm, way, ids, count)
                    if number:  # the first warms up
                        found[way].append(taken)
            for way in WAYS:
                ratios = [a / b for a, b in zip(found[way], found[WAYS[0]], strict=True)]
                per = 1000 / (count if count > 1 else ids.shape[1])
                told = {"what": what, "way": way, "ms": per * statistics.median(found[way])}
                print(json.dumps(told | {"time": statistics.median(ratios)}), flush=True)


def measure_bytes(texts: int, tokens: int, rate: float, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sizes = {**SIZES, "max_position_embeddings": 1024}
        model = tiny_model("llama", Path(folder), **sizes)
        with swarms(model, [(0, 2), (2, 4)], rate, threads=1, dtype=dtype) as notebooks:
            for what, ids, count in prompts(tokens, 128):
                size: dict[str, int] = {}
                for way, swarm in notebooks.items():
                    generated(swarm, way, ids.repeat(1, 2)[:, :256], tokens)
                    before = sent(swarm)
                    for _ in range(texts):
                        generated(swarm, way, ids, count)
                    size[way] = sent(swarm) - before
                neither, printed, audited = (size[way] for way in WAYS)
                told = {"what": what, "dtype": dtype, "rate": rate, "texts": texts}
                told["bytes"] = neither / texts / (count if count > 1 else ids.shape[1])
                told |= {"prints": printed / neither, "prints and audits": audited / neither}
                told["of_rate"] = (audited - printed) / neither / rate
                print(json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--texts", type=int, default=60)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    if given.texts:
        measure_bytes(given.texts, given.tokens, given.rate, given.dtype)
    if given.rounds:
        measure_time(given.rounds, given.tokens, given.threads)


if __name__ == "__main__":
    main()
