"""What of other projects' tests is refused, as `refused.txt` lists it."""

from __future__ import annotations

from pathlib import Path


def reason_for(said: str) -> str | None:
    """Why a test that ended with these words (its name, its error) was refused, if it was."""
    lines = Path(__file__).with_name("refused.txt").read_text().splitlines()
    entries = [line.split(" | ") for line in lines if line and line[0] != "#"]
    return next((reason for pattern, reason in entries if pattern in said), None)
