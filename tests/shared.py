"""Swarms that outlive single tests and whose servers tests kill and start again.

In a module of its own, because pytest and an import make two modules of ``conftest``.
"""

from __future__ import annotations

import contextlib

import psutil

from swarm_notebook import LocalSwarm

swarms: list[LocalSwarm] = []


def processes() -> set[int]:
    """Their servers, with the network daemons."""
    found: set[int] = set()
    for server in (server for swarm in swarms for server in swarm.servers):
        with contextlib.suppress(psutil.NoSuchProcess):
            if server.pid is not None and server.running:
                found |= {server.pid, *(kid.pid for kid in psutil.Process(server.pid).children())}
    return found
