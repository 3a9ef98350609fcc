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


def test_a_pause_is_of_the_faults_that_began_in_it(told: Told) -> None:
    now = time.monotonic()
    first = Fault("kill", now - 18, now - 16)
    second = Fault("stop", now - 17, now - 16)
    elsewhere = Fault("kill", now - 14.7, now - 14.6, "server-3", covered=False)
    told.faults += [first, elsewhere, second]
    found = told.pauses()
    assert found[first] == found[second] == pytest.approx(4.0, abs=0.1)
    assert found[elsewhere] == pytest.approx(14.5, abs=0.1)  # none began in what came after it
    told.faults.append(Fault("sleep", now - 17.5, now - 16.5))
    assert told.pauses()[first] == pytest.approx(3.0, abs=0.1)
    told.faults.append(Fault("sleep", now - 14, now - 9))
    found = told.pauses()
    assert found[elsewhere] == pytest.approx(0.5, abs=0.1)
    assert found[told.faults[-1]] == pytest.approx(14.5 - 5, abs=0.1)
    rows = told.table().splitlines()
    assert rows[0].split()[:2] == ["9.5", "s:"]
    assert [row.split()[:5] for row in rows if row.startswith("no other")] == [
        ["no", "other", "server", "1", "0.5"]
    ]


def test_what_is_usual_is_told_beside_it(told: Told) -> None:
    now = time.monotonic()
    told.quiet = now - 16, now - 1
    assert told.usual() == pytest.approx([0.5, 14.5], abs=0.1)
    assert "no fault               2    7.5 s   14.5 s" in told.table()


def test_what_is_long_over_has_no_part_in_a_pause(told: Told) -> None:
    now = time.monotonic()
    told.faults.append(Fault("kill", now - 19.5, now - 14.5 - AFTER_SECONDS - 0.4))
    assert told.pauses()[told.faults[0]] == pytest.approx(4.0, abs=0.1)


def test_a_work_that_has_stopped_is_a_pause_until_the_end(told: Told) -> None:
    told.beats["token"].pop()
    told.end()
    now = time.monotonic()
    told.faults.append(Fault("kill", now - 12, now - 8))
    assert list(told.pauses().values()) == [pytest.approx(14.5, abs=0.1)]


def test_what_is_counted(told: Told) -> None:
    assert told.counts == {"tokens": 48, "wrong": 1}
    assert (len(told.errors), told.unclear) == (2, ["KeyError"])
