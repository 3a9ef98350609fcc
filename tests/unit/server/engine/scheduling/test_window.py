"""For whom a call waits, decided without a clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swarm_notebook.server.engine.scheduling.scheduler import Kind, Task
from swarm_notebook.server.engine.scheduling.window import GATHER_SECONDS, BatchWindow


def task(session: object, kind: Kind = Kind.STEP, group: object = "blocks") -> Task:
    return Task(kind, "client", 1, group, session=session)


def decoding(
    pauses: dict[str, float], call: Callable[[int], float], rounds: int = 60
) -> tuple[BatchWindow, float]:
    """Sessions that were answered together time and again; the moment of the last answers."""
    window, now = BatchWindow(), 10.0
    sessions = list(pauses)
    for turn in range(rounds):
        for session in sessions:
            window.came(task(session), now + pauses[session])
        # In calls of different sizes, so that it can be learned how their time grows.
        cut = turn % len(sessions)
        now += max(pauses.values()) + flat(1)
        for some in (sessions[:cut], sessions[cut:]):
            if some:
                window.ran([task(session) for session in some], call(len(some)), now)
    return window, now


def flat(_: int) -> float:
    return 0.010


def test_who_is_alone_never_waits() -> None:
    window, now = decoding({"a": 0.002}, flat)
    window.came(task("a"), now + 0.002)
    assert window.patience(1, now + 0.002) == 0
    assert BatchWindow().patience(1, now) == 0
    assert window.patience(0, now) == 0


def test_those_who_are_about_to_come_are_waited_for() -> None:
    window, now = decoding({"a": 0.001, "b": 0.003, "c": 0.004}, flat)
    window.came(task("a"), now + 0.001)
    assert window.patience(1, now + 0.001) == pytest.approx(0.003, rel=0.1)
    window.came(task("b"), now + 0.003)
    window.came(task("c"), now + 0.004)
    assert window.patience(3, now + 0.004) == 0


def test_who_comes_much_later_is_not_waited_for() -> None:
    window, now = decoding({"a": 0.001, "far": 0.015}, flat)
    window.came(task("a"), now + 0.001)
    assert window.patience(1, now + 0.001) == 0
    window, now = decoding({"a": 0.001, "farther": 1.5 * GATHER_SECONDS}, lambda _: 1.0)
    window.came(task("a"), now + 0.001)
    assert window.patience(1, now + 0.001) == 0


def test_many_do_not_wait_for_one() -> None:
    pauses = {f"fast {n}": 0.001 for n in range(12)} | {"slow": 0.008}
    window, now = decoding(pauses, flat)
    for session in list(pauses)[:12]:
        window.came(task(session), now + 0.001)
    assert window.patience(12, now + 0.001) == 0
    assert window.patience(1, now + 0.001) > 0


def test_where_calls_take_longer_with_each_step_there_is_no_waiting() -> None:
    window, now = decoding({"a": 0.001, "b": 0.004}, lambda steps: 0.010 * steps)
    window.came(task("a"), now + 0.001)
    assert window.patience(1, now + 0.001) == 0


def test_who_is_late_or_gone_is_not_waited_for() -> None:
    window, now = decoding({"a": 0.001, "b": 0.003}, flat)
    window.came(task("a"), now + 0.001)
    assert window.patience(1, now + 0.001) > 0
    assert window.patience(1, now + 0.1) == 0
    for _ in range(400):
        now += 0.01
        window.ran([task("a")], 0.01, now)
        window.came(task("a"), now + 0.001)
    assert len(window._rhythms) == 1


def test_only_steps_that_could_share_a_call_have_a_rhythm() -> None:
    window = BatchWindow()
    window.came(task("a", Kind.PREFILL_CHUNK), 10.0)
    window.came(task("b", group=None), 10.0)
    assert not window._rhythms


def read_one_by_one(seconds: float, crowd: int = 32) -> tuple[BatchWindow, float]:
    """A crowd that shared each call; who was answered last comes back last."""
    return decoding({f"{n}": 0.001 + seconds * (n + 1) for n in range(crowd)}, flat, rounds=80)


def arrived(window: BatchWindow, now: float, seconds: float, count: int) -> float:
    for n in range(count):
        window.came(task(f"{n}"), now + 0.001 + seconds * (n + 1))
    return now + 0.001 + seconds * count


def test_a_crowd_whose_way_back_is_long_takes_turns() -> None:
    window, now = read_one_by_one(0.0005)
    assert window.patience(16, arrived(window, now, 0.0005, 16)) == 0
    window, now = read_one_by_one(0.0005)
    assert window.patience(12, arrived(window, now, 0.0005, 12)) > 0
    assert window.awaited <= 4


def test_a_crowd_whose_way_back_is_short_shares_each_call() -> None:
    window, now = read_one_by_one(0.0001)
    assert window.patience(16, arrived(window, now, 0.0001, 16)) > 0
    assert window.awaited > 8
