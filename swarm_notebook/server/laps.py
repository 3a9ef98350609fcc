"""Where the seconds of a start went, for who reads the log."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import TypeVar

_T = TypeVar("_T")


class Laps:
    """A stopwatch that runs from now on, and notes what was waited for."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._noted: list[str] = []

    async def of(self, what: str, work: Awaitable[_T]) -> _T:
        """Wait for some work, and note how long that took."""
        began = time.monotonic()
        done = await work
        self._noted.append(f"{time.monotonic() - began:.1f} {what}")
        return done

    def __str__(self) -> str:
        return f"{time.monotonic() - self._began:.1f} s ({', '.join(self._noted)})"
