"""The temporary folder of servers of this machine: logs, and a private key while p2pd reads it.

It is removed when it is no longer needed, when its owner is garbage, and when the interpreter
ends. If this process is killed, the servers remove it (``serve --scratch``), for their standard
input ends then. What stays is the log of a server that failed, for whoever looks into it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from pathlib import Path

from swarm_notebook.errors import ServerStartError

PREFIX = "swarm-notebook-"
# The log of a start and a key take a few kB.
LEAST_BYTES = 64 << 10


class ServerFolder:
    """A new temporary folder that only this user can read.

    Raises:
        ServerStartError: it cannot be made.
    """

    path: Path

    def __init__(self) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        except OSError as error:
            raise ServerStartError(
                f"no temporary folder for servers can be made: {error}; free some room, or set "
                "TMPDIR to a folder where there is some"
            ) from None
        self._kept: set[str] = set()
        self._end = weakref.finalize(self, _remove, self.path, self._kept)

    def make(self) -> None:
        """Make it anew if it was removed: a server of a swarm that was closed is restarted."""
        if not self._end.alive:
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._end = weakref.finalize(self, _remove, self.path, self._kept)

    def full(self) -> str:
        """What to say if there is no room left where it lies; else nothing."""
        free = shutil.disk_usage(self.path).free
        if free >= LEAST_BYTES:
            return ""
        return (
            f" The disk with {self.path} is full ({free} bytes are free): free some room, or set "
            "TMPDIR to a folder where there is some."
        )

    def keep(self, log: Path) -> None:
        """Let a log stay when the rest is removed."""
        self._kept.add(log.name)

    def remove(self) -> None:
        """Remove everything but logs that are kept."""
        self._end()


def _remove(path: Path, kept: set[str]) -> None:
    with contextlib.suppress(FileNotFoundError):
        for file in path.iterdir():
            if file.is_dir():  # the keys of a private swarm
                shutil.rmtree(file, ignore_errors=True)
            elif file.name not in kept:
                file.unlink(missing_ok=True)
        if not kept:
            path.rmdir()
