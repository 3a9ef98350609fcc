"""What audits find of servers that lie, over many texts: the liars of the tests on the demo model.

Prints JSON lines. Blocks of the demo model answer wrong for one text after another; each answer is
audited 32 tokens at a time, as two audits of a server would. `first` and `second` say for how many
texts the first audit found it, and for how many only the second; `missed` is to be 0. `--curve` is
about one token in a hundred that is edited: after how many passes of 128 tokens it is found, by the
rate of audits, for a server that is not new (of a new one the first 128 tokens are audited).
`--gradients` is about poisoned backward passes, each of which is one audit.

    python benchmarks/lies.py [--seeds 100] [--server bfloat16] [--blocks 10:20]
                              [--replay float32@cuda] [--model FOLDER] [--curve | --gradients]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from collections import Counter, defaultdict
from typing import Any

import torch
from audits import Bench, Kind, backwards, gradient_replays, gradients_of, liars

from swarm_notebook.client.audit import limits
from swarm_notebook.client.audit.choice import PieceSampler
from swarm_notebook.client.audit.comparison import Errors, compare, compare_gradients
from swarm_notebook.server.engine.passes import backward
from swarm_notebook.server.engine.requests import Forward

# The goal is said of two audits of so many tokens each.
AUDITS, TOKENS = 2, limits.MIN_TOKENS
PASS_TOKENS = 128
RATES = (0.005, 0.01, 0.02, 0.05, 0.1)
RUNS = 2000


Replays = tuple[torch.Tensor, torch.Tensor | None]


def found(
    bench: Any, lie: liars.Lie, hidden: torch.Tensor, replays: Replays, size: int
) -> list[bool]:
    """Whether each audit of so many tokens of the answer finds the lie."""
    reference, twin = replays
    with liars.lying(bench, lie):
        answer = bench._run(Forward((bench.start, bench.end), hidden))
    cuts = [slice(begin, begin + size) for begin in range(0, answer.shape[1] - size + 1, size)]
    every = [
        compare(answer[:, cut], reference[:, cut], None if twin is None else twin[:, cut])
        for cut in cuts
    ]
    return [bool(limits.what_is_wrong(errors, torch.float32)) for errors in every]


def poisoned(bench: Bench, lie: liars.Lie, seeds: int) -> int:
    """In how many backward passes one audit finds the lie."""
    hits = 0
    for request in itertools.islice(backwards(bench), seeds):
        reference, twin = gradient_replays(bench, request)
        with liars.lying(bench, lie):  # type: ignore[arg-type]
            answer = gradients_of(backward.recompute(bench.span, request))
        errors, _ = compare_gradients(answer, reference, twin)
        hits += bool(limits.judged(errors, Errors(), torch.float32, back=True)[1])
    return hits


def curve(bench: Bench, seeds: int, said: dict[str, Any]) -> None:
    """How many passes it takes until one with an edited token is audited and found."""
    source, edited = bench.texts(PASS_TOKENS), liars.edited(100)
    inputs = (bench.inputs(next(source)[None]) for _ in range(seeds))
    hits = [found(bench, edited, one, bench.replays(one), PASS_TOKENS)[0] for one in inputs]
    share, draw = sum(hits) / len(hits), random.Random(0)
    for rate in RATES:
        sampler, passes, counts = PieceSampler(rate, draw), 0, []
        cost = PASS_TOKENS * (1 if bench.dtype == torch.float32 else 2)
        while len(counts) < RUNS:
            passes += 1
            audited = sampler.draw(PASS_TOKENS, PASS_TOKENS, cost, stranger=False)
            if audited and draw.random() < share:
                counts.append(passes)
                passes = 0
        tenths = statistics.quantiles(counts, n=10)
        told = {"rate": rate, "found_per_audit": share, "passes": statistics.mean(counts)}
        print(json.dumps(said | told | {"passes_90_percent": tenths[-1]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--server", type=Kind.parse, default=Kind(), metavar="KIND")
    parser.add_argument("--replay", type=Kind.parse, default=None, metavar="KIND")
    parser.add_argument("--blocks", default="10:20")
    parser.add_argument("--model", default=None, help="a folder, file or name; else the demo")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--gradients", action="store_true")
    given = parser.parse_args()
    start, end = map(int, given.blocks.split(":"))
    bench = Bench(start, end, given.server, given.replay, given.model)
    said = {"server": str(given.server), "replay": str(given.replay or given.server)}
    said |= {"blocks": given.blocks, "seeds": given.seeds}
    if given.curve:
        curve(bench, given.seeds, said)
        return
    if given.gradients:
        for name, lie in liars.GRADIENT_LIES.items():
            hits = poisoned(bench, lie, given.seeds)
            print(json.dumps(said | {"lie": name, "first": hits}), flush=True)
        return
    torch.manual_seed(0)
    source, by = bench.texts(AUDITS * TOKENS), defaultdict[str, Counter[str]](Counter)
    for _ in range(given.seeds):
        hidden = bench.inputs(next(source)[None])
        replays = bench.replays(hidden)
        for name, lie in liars.LIES.items():
            first, second = found(bench, lie, hidden, replays, TOKENS)
            by[name]["first" if first else "second" if second else "missed"] += 1
    for name, counts in by.items():
        print(json.dumps(said | {"lie": name} | counts), flush=True)


if __name__ == "__main__":
    main()
