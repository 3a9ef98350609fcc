"""What a server says of its speed, while others take its cores and after it has worked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swarm_notebook.server.engine import throughput
from swarm_notebook.server.engine.scheduling.scheduler import UPKEEP, Kind, Task
from swarm_notebook.server.engine.throughput import RateMeter, Throughput, bound_from


def test_the_best_of_several_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time somebody else has the core."""
    now = 0.0

    def work() -> None:
        nonlocal now
        now += 0.002 if 0.2 < now < 0.35 else 0.02

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    assert throughput._rate(0.1, throughput.TRIES, work) == pytest.approx(500, rel=0.25)
    assert throughput._rate(0.1, throughput.TRIES, work) == pytest.approx(50, rel=0.01)


def test_steps_that_were_computed_take_the_place_of_the_first_guess() -> None:
    meter = RateMeter(Throughput(inference_rps=10.0, forward_rps=100.0))
    for _ in range(400):
        meter.ran(Task(Kind.STEP, "client", 1, None, blocks=5), 0.05)
        meter.ran(Task(Kind.PREFILL_CHUNK, "client", 200, None, blocks=5), 0.5)
        # These say nothing of the blocks' speed.
        meter.ran(Task(Kind.PREFILL_CHUNK, "client", 32, None, blocks=5), 5.0)
        meter.ran(Task(Kind.STEP, "client", 0), 0.0)
        meter.ran(UPKEEP, 5.0)
    assert meter.rates.inference_rps == pytest.approx(100, rel=0.02)
    assert meter.rates.forward_rps == pytest.approx(2000, rel=0.02)


@pytest.mark.parametrize(
    ("seconds", "tokens"),
    [
        (lambda n: n / 1e5, 64),  # a CPU
        (lambda n: 7e-4 + n / 1e7, 1024),  # a card: launching takes as long as 7,000 tokens
        (lambda n: max(7e-4, n / 4e5), 256),
        (lambda n: 1e-3 * n + 0.5, 64),  # slow: not tried with more
    ],
)
def test_where_a_pass_is_bound_by_its_tokens(seconds: Callable[[int], float], tokens: int) -> None:
    assert bound_from(seconds) == tokens
