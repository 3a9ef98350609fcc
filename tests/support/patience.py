"""Waiting on machines that may have other things to do.

A test waits for what must happen, for as long as a very busy machine may need; it fails when that
did not happen, never because it was slow. Where time itself is what is promised (an interrupt is
answered at once), `within` tells a machine without time to spare from a promise that is broken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 180.0  # seconds; what takes longer has not happened
POLL_SECONDS = 0.02
BURN_SECONDS = 0.1


def wait_until(
    condition: Callable[[], object], what: str = "it", poll: float = POLL_SECONDS
) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {PATIENCE:.0f} s"
        time.sleep(poll)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is inside takes less than `seconds`, on a machine with a core to spare.

    On another one it may take as many times as long as a computation does.
    """
    before, began = slowdown(), time.monotonic()
    yield
    taken = time.monotonic() - began
    if taken >= seconds:
        factor = max(before, slowdown())
        assert taken < seconds * factor, f"{taken:.1f} s, computations take {factor:.1f} times long"


def slowdown() -> float:
    """How many times as long as its time on a core a computation takes now; about 1 if idle."""
    began, used = time.perf_counter(), time.thread_time()
    while time.thread_time() - used < BURN_SECONDS:
        pass
    return (time.perf_counter() - began) / BURN_SECONDS
