"""The most memory that a process has had for a while, as Linux counts it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class Peak:
    """From now on, how many bytes more than now process ``pid`` has had at most."""

    def __init__(self, pid: int | None = None):
        self._folder = Path("/proc") / str(pid or os.getpid())
        (self._folder / "clear_refs").write_text("5")  # the peak begins anew
        self._before = self._read("VmRSS")

    def _read(self, field: str) -> int:
        for line in (self._folder / "status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) << 10
        raise LookupError(field)

    @property
    def bytes(self) -> int:
        return self._read("VmHWM") - self._before


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that this process takes besides what it has, at most, while it works."""
    peak = Peak()
    work()
    return peak.bytes
