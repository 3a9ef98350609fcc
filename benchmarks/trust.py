"""What border prints and audits cost in time and bytes; prints JSON lines.

The demo model on four servers of this machine, two of each half, which hand over to each other. A
notebook decodes without both, with prints, and with prints and audits at the default rate by turns:
milliseconds per token, and bytes of the notebook per token, are medians of the ratios to the
first. A long prompt, too. Servers that are new are audited in any case, which is not what a day
costs: so they are audited first.

    python benchmarks/trust.py [--rounds 7] [--tokens 64] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

import swarm_notebook as sn
from swarm_notebook.net.dht.records import ServerSpan
from swarm_notebook.swarm import Swarm

PROMPT_TOKENS = 512
WAYS = ("neither", "prints", "prints and audits")


@contextmanager
def without_prints() -> Iterator[None]:
    """As if servers made none."""
    kept = ServerSpan.prints
    ServerSpan.prints = property(lambda _: False)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ServerSpan.prints = kept  # type: ignore[method-assign]


def sent(swarm: Swarm) -> int:
    """Bytes that the notebook has sent and received."""
    bill = swarm.bill()
    return bill.sent + bill.received


def measured(swarm: Swarm, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Milliseconds and bytes per token, of a generation or (no tokens) of the prompt's own."""
    bytes_before, began = sent(swarm), time.perf_counter()
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    swarm.model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    taken = time.perf_counter() - began
    count = tokens if ids.shape[1] < PROMPT_TOKENS else ids.shape[1]
    swarm.audit(wait=600)
    return 1000 * taken / count, (sent(swarm) - bytes_before) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with ExitStack() as stack:
        spans = [(0, 15), (15, 30)] * 2
        local = stack.enter_context(sn.LocalSwarm(servers=spans, threads=given.threads))
        swarms = {
            way: stack.enter_context(
                sn.connect(
                    local.initial_peers,
                    model=local.model,
                    verify="spot" if way == WAYS[-1] else "off",
                )
            )
            for way in WAYS
        }
        ids = torch.randint(3, 40_000, (1, PROMPT_TOKENS))
        for what, prompt, tokens in (("decode", ids[:, :8], given.tokens), ("prompt", ids, 1)):
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            for number in range(given.rounds + 1):
                for way, swarm in swarms.items():
                    with without_prints() if way == WAYS[0] else ExitStack():
                        one = measured(swarm, prompt, tokens)
                    if number:  # the first warms up
                        found[way].append(one)
            for way in WAYS:
                pairs = list(zip(found[way], found[WAYS[0]], strict=True))
                time_, size = (
                    statistics.median(mine[k] / theirs[k] for mine, theirs in pairs) for k in (0, 1)
                )
                told = {"what": what, "way": way, "ms": statistics.median(x for x, _ in found[way])}
                told["bytes"] = statistics.median(y for _, y in found[way])
                print(json.dumps(told | {"time": time_, "size": size}), flush=True)


if __name__ == "__main__":
    main()
