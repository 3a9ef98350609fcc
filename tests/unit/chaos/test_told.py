"""What the chaos run makes of what its notebook tells."""

from __future__ import annotations

import json
import time

import pytest
from chaos.told import AFTER_SECONDS, Fault, Told


@pytest.fixture
def told() -> Told:
    now, told = time.monotonic(), Told()
    facts = [{"beat": "token", "at": now + at} for at in (-20, -19, -15, -14.5, 0)]
    facts += [{"beat": "step", "at": now - at / 2} for at in range(60, 0, -1)]
    facts += [{"counts": {"tokens": 24, "wrong": 1}}, {"counts": {"tokens": 24, "wrong": 0}}]
    facts += [{"error": "ServerFailed: …", "clear": True}, {"error": "KeyError", "clear": False}]
    told.read(["no fact", *map(json.dumps, facts)])
    return told


def test_a_pause_is_the_longest_time_without_a_beat_around_a_fault(told: Told) -> None:
    now = time.monotonic()
    fault = Fault("kill", now - 18, now - 16 - AFTER_SECONDS)
    assert told.pause(fault) == pytest.approx(4.0, abs=0.1)
    told.faults.append(Fault("sleep", now - 18, now - 17))
    assert told.pause(fault) == pytest.approx(3.0, abs=0.1)
    told.faults.append(Fault("sleep", now - 17, now - 9))
    assert told.pause(fault) == pytest.approx(1.0, abs=0.1)
    assert told.pause(Fault("kill", now - 12, now - 8)) == pytest.approx(14.5 - 5.5, abs=0.1)


def test_a_work_that_has_stopped_is_a_pause_until_the_end(told: Told) -> None:
    told.beats["token"].pop()
    told.end()
    now = time.monotonic()
    assert told.pause(Fault("kill", now - 12, now - 8)) == pytest.approx(14.5, abs=0.1)


def test_what_is_counted(told: Told) -> None:
    assert told.counts == {"tokens": 48, "wrong": 1}
    assert (len(told.errors), told.unclear) == (2, ["KeyError"])
