"""Who waits for work is woken for as much of it as it wants, and loses none."""

from __future__ import annotations

import threading
import time

from support.patience import PATIENCE

from swarm_notebook.server.engine.scheduling.arrivals import Arrivals


def test_what_has_arrived_is_taken_in_order() -> None:
    arrivals: Arrivals[int] = Arrivals()
    for work in range(3):
        arrivals.put(work, urgent=False)
    assert arrivals.wait(3, 0.0)
    assert arrivals.take() == [0, 1, 2]
    assert arrivals.take() == []


def test_it_waits_for_all_that_are_wanted_or_until_the_time_is_over() -> None:
    arrivals: Arrivals[int] = Arrivals()
    arrivals.put(1, urgent=False)
    assert not arrivals.wait(2, 0.01)
    assert arrivals.take() == [1]


def test_what_is_urgent_wakes_at_once() -> None:
    arrivals: Arrivals[int] = Arrivals()
    timer = threading.Timer(0.05, arrivals.put, [1], {"urgent": True})
    timer.start()
    began = time.monotonic()
    assert arrivals.wait(5, PATIENCE)
    assert arrivals.take() == [1]
    assert time.monotonic() - began < PATIENCE
    timer.join()


def test_nothing_is_lost_however_both_sides_meet() -> None:
    arrivals: Arrivals[int] = Arrivals()
    count, got = 20_000, []

    def put() -> None:
        for work in range(count):
            arrivals.put(work, urgent=work % 97 == 0)

    thread = threading.Thread(target=put)
    thread.start()
    while len(got) < count:
        assert arrivals.wait(min(3, count - len(got)), PATIENCE) or arrivals._waiting
        got += arrivals.take()
    thread.join()
    assert got == list(range(count))
