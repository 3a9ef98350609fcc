"""What is waited for is said, if it takes longer than a moment."""

from __future__ import annotations

import threading

import pytest
from support.patience import wait_until

from swarm_notebook.progress import Waiting


def wait_for(capsys: pytest.CaptureFixture[str], text: str) -> str:
    """What was shown so far, as soon as `text` is in it."""
    seen: list[str] = []

    def shown() -> bool:
        seen.append(capsys.readouterr().err)
        return text in "".join(seen)

    wait_until(shown, f"{text!r}")
    return "".join(seen)


def test_it_shows_what_it_waits_for_while_this_thread_is_busy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = [0]
    with Waiting("Reading", total=9, unit="blocks", count=lambda: done[0], after=0.0) as waiting:
        wait_for(capsys, "Reading: 0 of 9 blocks")
        done[0] = 4
        waiting.say("Loading")
        wait_for(capsys, "Loading: 4 of 9 blocks")
    assert "swarm_notebook-waiting" not in [thread.name for thread in threading.enumerate()]


def test_a_moment_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="inside"), Waiting("Reading", after=60.0):
        raise ValueError("inside")
    assert not capsys.readouterr().err
