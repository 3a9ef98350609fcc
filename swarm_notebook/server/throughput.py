"""How fast this server is, measured on the first of its blocks when it starts.

Petals' definition: tokens per second through one block, once for single steps with a cache
(``inference_rps``) and once for long passes without one (``forward_rps``). Routing adds up the
times of the blocks, placement compares servers by ``throughput``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from swarm_notebook.server.cache import SessionCache
from swarm_notebook.server.span import Span

SECONDS = 0.5
MIN_RUNS = 3
FORWARD_TOKENS = 128
CONTEXT_TOKENS = 64


@dataclass(frozen=True)
class Throughput:
    """Tokens per second through one block."""

    inference_rps: float
    forward_rps: float

    def of_span(self, blocks: int) -> float:
        """Tokens per second of a request that uses half of the blocks, as requests do on average.

        It is what Petals servers announce as ``throughput``.
        """
        return self.forward_rps * 2 / (blocks + 1)


def measure(span: Span, hidden_size: int) -> Throughput:
    """Run the first block for about a second."""
    start, end = span.start, span.start + 1
    token = torch.zeros(1, 1, hidden_size)
    long = torch.zeros(1, FORWARD_TOKENS, hidden_size)
    cache = SessionCache(start, span.end)
    cache.restart(1)
    cache.reserve(2 * CONTEXT_TOKENS)
    span.run(start, end, long[:, :CONTEXT_TOKENS], cache=cache)

    def step() -> None:
        cache.truncate(start, end, CONTEXT_TOKENS)
        span.run(start, end, token, cache=cache)[0].cpu()

    def forward() -> None:
        span.run(start, end, long)[0].cpu()

    return Throughput(_rate(step), FORWARD_TOKENS * _rate(forward))


def _rate(work: Callable[[], None]) -> float:
    """Calls per second, after one call to warm up."""
    work()
    runs, begun = 0, time.perf_counter()
    while True:
        work()
        runs += 1
        seconds = time.perf_counter() - begun
        if seconds >= SECONDS and runs >= MIN_RUNS:
            return runs / seconds
