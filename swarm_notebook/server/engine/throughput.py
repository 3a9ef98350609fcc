"""How fast this server is: measured on the first of its blocks when it starts, then by its work.

Petals' definition: tokens per second through one block, once for single steps with a cache
(``inference_rps``) and once for long passes without one (``forward_rps``). Routing adds up the
times of the blocks, placement compares servers by ``throughput``.

Another server that starts on the same machine takes the cores for seconds at a time, so at start
the best of several short runs counts. From then on `RateMeter` follows the steps and long prefills
that are really computed, with the contexts and the batches that they have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from swarm_notebook.server.engine.kv.cache import SessionCache
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.scheduling.scheduler import Kind, Task
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.engine.steps.session_state import BatchItem, SessionState, run_one

# Six runs of a tenth of a second: a server that starts beside takes the cores for longer than one.
SECONDS = 0.1
TRIES = 6
# On a card a neighbour can only make launches late, and somebody may be waiting: of 4.4 s that a
# server of 32 blocks on an H200 took from its weights to its first answer, 2.3 went into runs as
# long as on a CPU.
CARD_SECONDS, CARD_TRIES = 0.02, 3
MIN_RUNS = 2
# Enough tokens for the speed of a long pass, and a context as of a conversation that begins.
FORWARD_TOKENS = 128
CONTEXT_TOKENS = 64
# A pass is bound by its tokens where twice as many take about twice as long. On an H200 32 blocks
# of an 8B model take 20 to 25 ms for however few: so long their kernels are launched.
TWICE = 1.8
FEWEST_TOKENS, MOST_TOKENS = 64, 1024
PASS_TRIES = 3
# The newest value's weight in a running mean: half is forgotten after 34 calls.
_NEWEST = 0.02

# Calls per second of some work.
_Rate = Callable[[Callable[[], None]], float]


@dataclass(frozen=True)
class Throughput:
    """Tokens per second through one block.

    Attributes:
        part_tokens: from how many tokens on a pass is bound by them, and not by what every pass
            costs: parts of a long prompt that are smaller are slower in all.
    """

    inference_rps: float
    forward_rps: float
    part_tokens: int = FEWEST_TOKENS

    def of_span(self, blocks: int) -> float:
        """Tokens per second of a request that uses half of the blocks, as requests do on average.

        It is what Petals servers announce as ``throughput``.
        """
        return self.forward_rps * 2 / (blocks + 1)


def measure(span: Span, hidden_size: int, batching: Batching | None = None) -> Throughput:
    """Run the first block for about a second, on a card less.

    Steps run as `batching` runs them, if it is given.
    """
    long = torch.zeros(1, FORWARD_TOKENS, hidden_size)
    on_card = span.device.type != "cpu"
    rate = partial(_rate, *((CARD_SECONDS, CARD_TRIES) if on_card else (SECONDS, TRIES)))

    def forward() -> None:
        span.run(span.start, span.start + 1, long)[0].cpu()

    if batching is not None and batching.decoding is not None:
        # And not beside them: what a card loads for steps of one block took 0.7 s on an H200.
        steps = _rate_of_graphs(span, long, batching, rate)
    else:
        steps = _rate_of_steps(span, long, rate)
    forwards = FORWARD_TOKENS * rate(forward)
    return Throughput(steps, forwards, bound_from(partial(_pass_seconds, span, hidden_size)))


def bound_from(seconds: Callable[[int], float]) -> int:
    """The fewest tokens, a power of two, of which twice as many take about twice as long.

    Args:
        seconds: how long a pass of so many tokens takes.
    """
    tokens, taken = FEWEST_TOKENS, seconds(FEWEST_TOKENS)
    # What takes that long has long been bound by its tokens.
    while tokens < MOST_TOKENS and taken < SECONDS:
        longer = seconds(2 * tokens)
        if longer >= TWICE * taken:
            break
        tokens, taken = 2 * tokens, longer
    return tokens


def _pass_seconds(span: Span, hidden_size: int, tokens: int) -> float:
    """How long the first block takes for so many tokens, which are where it is.

    For ever, if there is no room for them beside the sessions' cache.
    """
    hidden = torch.zeros(1, tokens, hidden_size, dtype=span.dtype, device=span.device)

    def run() -> float:
        began = time.perf_counter()
        span.run(span.start, span.start + 1, hidden)[0][:, -1:].cpu()
        return time.perf_counter() - began

    try:
        run()
        return min(run() for _ in range(PASS_TRIES))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return math.inf


def _rate_of_steps(span: Span, long: torch.Tensor, rate: _Rate) -> float:
    """Steps per second of the first block."""
    start, end = span.start, span.start + 1
    cache = SessionCache(start, span.end)
    cache.restart(1)
    cache.reserve(2 * CONTEXT_TOKENS)
    span.run(start, end, long[:, :CONTEXT_TOKENS], cache=cache)

    def step() -> None:
        cache.truncate(start, end, CONTEXT_TOKENS)
        span.run(start, end, long[:, :1], cache=cache)[0].cpu()

    return rate(step)


def _rate_of_graphs(span: Span, long: torch.Tensor, batching: Batching, rate: _Rate) -> float:
    """Steps per second of one block, from those of all blocks together."""
    state = SessionState(span, None, cache=batching.new_cache())
    blocks = (span.start, span.end)
    run_one(BatchItem(state, Step(blocks, long[:, :CONTEXT_TOKENS]), 0, 0, CONTEXT_TOKENS))
    again = Step(blocks, long[:, :1], position=CONTEXT_TOKENS)

    def step() -> None:
        batching.run([BatchItem(state, again, CONTEXT_TOKENS, 0, 1)])

    step()  # captures
    try:
        return rate(step) * (span.end - span.start)
    finally:
        state.cache.release()


class RateMeter:
    """The rates as they are now, told of every step and prefill chunk by `worker`."""

    def __init__(self, measured: Throughput):
        self._part_tokens = measured.part_tokens
        self._step_seconds = 1 / measured.inference_rps
        self._token_seconds = 1 / measured.forward_rps

    @property
    def rates(self) -> Throughput:
        return Throughput(1 / self._step_seconds, 1 / self._token_seconds, self._part_tokens)

    def ran(self, task: Task, seconds: float) -> None:
        """A call of the blocks took so many seconds; of a batch, one task is given."""
        if not task.blocks:
            return
        if task.kind is Kind.STEP:
            # Steps that share a call take as long as the call.
            self._step_seconds += _NEWEST * (seconds / task.blocks - self._step_seconds)
        elif task.kind is Kind.PREFILL_CHUNK and task.tokens >= FORWARD_TOKENS:
            a_token = seconds / task.blocks / task.tokens
            self._token_seconds += _NEWEST * (a_token - self._token_seconds)


def _rate(seconds: float, tries: int, work: Callable[[], None]) -> float:
    """Calls per second in the best of some runs of so many seconds, after one to warm up."""
    work()
    return max(_run(work, seconds) for _ in range(tries))


def _run(work: Callable[[], None], seconds: float) -> float:
    runs, begun = 0, time.perf_counter()
    while True:
        work()
        runs += 1
        taken = time.perf_counter() - begun
        if taken >= seconds and runs >= MIN_RUNS:
            return runs / taken
