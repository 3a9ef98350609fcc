"""How long a piece of long work may take beside others."""

from __future__ import annotations

import pytest

from swarm_notebook.server.engine.scheduling.scheduler import Kind, Task
from swarm_notebook.server.engine.scheduling.turns import (
    ALONE_SECONDS,
    CROWDED_SECONDS,
    DECODING_SECONDS,
    Turns,
)


def decoding(turns: Turns, client: str, call: float, pause: float, until: float) -> None:
    """A client that decodes up to a moment, and was answered then."""
    task = Task(Kind.STEP, client)
    for turn in reversed(range(20)):
        now = until - turn * (call + pause)
        turns.came(task, now - call)
        turns.ran([task], call, now)


def piece(turns: Turns, client: str, now: float, others_wait: bool = False) -> float:
    return turns.piece_seconds(client, now, others_wait=others_wait)


def test_a_piece_takes_as_long_as_a_turn_of_somebody_else() -> None:
    turns = Turns()
    decoding(turns, "a", call=0.004, pause=0.003, until=10.0)
    assert piece(turns, "b", 10.0) == pytest.approx(0.007)
    # Not of who decodes himself.
    assert piece(turns, "a", 10.0) == ALONE_SECONDS
    decoding(turns, "c", call=0.002, pause=0.001, until=10.0)
    assert piece(turns, "b", 10.0) == pytest.approx(0.003)
    assert piece(turns, "a", 10.0) == pytest.approx(0.003)


def test_nobody_waits_long_for_who_is_slow_or_gone() -> None:
    turns = Turns()
    decoding(turns, "a", call=0.1, pause=0.4, until=10.0)
    assert piece(turns, "b", 10.0) == CROWDED_SECONDS
    assert piece(turns, "b", 10.0 + 2 * DECODING_SECONDS) == ALONE_SECONDS


def test_work_that_waits_has_no_turn_yet() -> None:
    turns = Turns()
    assert piece(turns, "b", 10.0) == ALONE_SECONDS
    assert piece(turns, "b", 10.0, others_wait=True) == CROWDED_SECONDS
    turns.ran([Task(Kind.STEP, "a")], 0.004, 10.0)
    assert piece(turns, "b", 10.0) == CROWDED_SECONDS


def test_a_pause_to_think_is_no_turn() -> None:
    turns = Turns()
    decoding(turns, "a", call=0.004, pause=0.003, until=10.0)
    decoding(turns, "a", call=0.004, pause=0.003, until=30.0)
    assert piece(turns, "b", 30.0) == pytest.approx(0.007)


def test_turns_that_were_held_up_do_not_make_pieces_longer() -> None:
    turns, task, now = Turns(), Task(Kind.STEP, "a"), 10.0
    decoding(turns, "a", call=0.004, pause=0.003, until=now)
    for pause in [0.003, 0.003, 0.06] * 20:
        turns.came(task, now + pause)
        now += pause + 0.004
        turns.ran([task], 0.004, now)
    assert piece(turns, "b", now) < 0.015
    # In the mean they took 0.026 s. Who has become slower is known to be so in time.
    for _ in range(60):
        turns.came(task, now + 0.03)
        now += 0.034
        turns.ran([task], 0.004, now)
    assert piece(turns, "b", now) > 0.03
