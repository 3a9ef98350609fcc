"""A watch over the servers and network daemons that tests start.

Every process that a test run starts inherits a mark in its environment, so that it is found even
when whoever started it has gone.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Collection

import psutil
from support import forkserver

from swarm_notebook import LocalSwarm

MARK = "SWARM_NOTEBOOK_TEST_RUN"
GRACE_SECONDS = 60.0

# Swarms that outlive single tests and whose servers tests kill and start again.
lasting_swarms: list[LocalSwarm] = []


def mark_this_run() -> None:
    """Every process that is started from now on counts as one of this run."""
    os.environ[MARK] = uuid.uuid4().hex


def marked_processes(known: Collection[int] = ()) -> dict[int, str]:
    """Servers and network daemons that this test run started and that still live.

    Args:
        known: processes that are none of them: to look at all takes longer than many a test.
    """
    found = {}
    for pid in set(psutil.pids()).difference(known):
        try:
            process = psutil.Process(pid)
            command = " ".join(process.cmdline())
            if (
                _ours(command)
                and process.pid not in {os.getpid(), forkserver.pid()}
                and process.environ().get(MARK) == os.environ[MARK]
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found[process.pid] = command
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_gone(known: Collection[int], seconds: float = GRACE_SECONDS) -> dict[int, str]:
    """Marked processes that are not `known` and do not go away within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        left = marked_processes({*known, *_of_lasting_swarms()})
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _ours(command: str) -> bool:
    names = ("swarm_notebook.cli", "swarm-notebook", "p2pd", forkserver.MARK)
    return any(name in command for name in names)


def _of_lasting_swarms() -> set[int]:
    found: set[int] = set()
    for server in (server for swarm in lasting_swarms for server in swarm.servers):
        with contextlib.suppress(psutil.NoSuchProcess):
            if server.pid is not None and server.running:
                found |= {server.pid, *(kid.pid for kid in psutil.Process(server.pid).children())}
    return found
