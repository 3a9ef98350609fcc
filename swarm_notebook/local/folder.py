"""The temporary folder of servers of this machine: logs, and a private key while p2pd reads it.

It is removed when it is no longer needed, when its owner is garbage, and when the interpreter
ends. If this process is killed, the servers remove it (``serve --scratch``), for their standard
input ends then. What stays is the log of a server that failed, for whoever looks into it.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from pathlib import Path

PREFIX = "swarm-notebook-"


class ServerFolder:
    """A new temporary folder that only this user can read."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._kept: set[str] = set()
        self._end = weakref.finalize(self, _remove, self.path, self._kept)

    def make(self) -> None:
        """Make it anew if it was removed: a server of a swarm that was closed is restarted."""
        if not self._end.alive:
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._end = weakref.finalize(self, _remove, self.path, self._kept)

    def keep(self, log: Path) -> None:
        """Let a log stay when the rest is removed."""
        self._kept.add(log.name)

    def remove(self) -> None:
        """Remove everything but logs that are kept."""
        self._end()


def _remove(path: Path, kept: set[str]) -> None:
    with contextlib.suppress(FileNotFoundError):
        for file in path.iterdir():
            if file.name not in kept:
                file.unlink(missing_ok=True)
        if not kept:
            path.rmdir()
