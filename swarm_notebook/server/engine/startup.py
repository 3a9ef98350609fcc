"""What blocks go through before they serve: how their weights multiply, and how fast they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch

from swarm_notebook.server.engine import throughput
from swarm_notebook.server.engine.products import few_bits, kernels
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.engine.steps.decode import Decoding, Impossible
from swarm_notebook.server.engine.steps.session_state import BatchItem, SessionState, run_one

# Of the prompts that `rehearse` runs: other lengths need other kernels of products. And of its
# sessions together.
_REHEARSED_TOKENS, _REHEARSED_CACHE = (64, 128, 256, 512, 1024), 1024


def prepare(
    span: Span,
    hidden_size: int,
    tokens: int,
    threads: int | None,
    later: Callable[[Callable[[], None]], None],
    *,
    reproducible: bool = False,
) -> tuple[Batching, throughput.Throughput]:
    """In the torch thread: whether sessions can share a call, and how fast the blocks are.

    Args:
        tokens: how many cache tokens the sessions may have.
        threads: of torch, if somebody has chosen their number.
        reproducible: no row's bits may depend on who else is served.
        later: runs something in the torch thread when nobody waits for it.
    """
    if span.device.type == "cuda" and threads is None:
        leave_cores_alone()
    few_bits.install(span.layers)
    batching = replace(Batching.try_out(span, hidden_size), alone=reproducible)
    if span.device.type == "cuda":
        batching = batching.with_decoding(span, hidden_size, tokens)
    rates = throughput.measure(span, hidden_size, batching)
    if not reproducible:  # which product is faster is found out while others are served
        kernels.install(span.layers, later)
    return batching, rates


def rehearse(span: Span, hidden_size: int) -> None:
    """Run what a card is asked first, so that what it loads or Triton compiles for it is there.

    In any thread, while the weights are read.

    Args:
        span: a block like those that are to be served.
    """
    Batching.try_out(span, hidden_size)
    with suppress(Impossible):  # then the blocks themselves cannot, either
        Decoding.try_out(span, hidden_size, _REHEARSED_CACHE, capture=False)
    for tokens in _REHEARSED_TOKENS:
        state = SessionState(span, None)
        hidden = torch.zeros(1, tokens, hidden_size)
        run_one(BatchItem(state, Step((span.start, span.end), hidden), 0, 0, tokens))


def leave_cores_alone() -> None:
    """Let torch compute in the calling thread alone, and in those that begin later.

    What a server with a card does beside it is small, and waking other cores takes longer: on an
    H100 with 16 cores a step of 16 sessions took 23 ms, of which the card was busy for 12.
    """
    torch.set_num_threads(1)
