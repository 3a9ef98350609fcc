"""What tests see and change of a notebook's side that users need not: all of it in one place."""

from __future__ import annotations

from typing import Any

from swarm_notebook.client.connection import Connection
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.swarm import Swarm


def connection_of(swarm: Swarm) -> Connection:
    return swarm._connection


def directory_of(swarm: Swarm) -> Directory:
    """What is known of the servers; `patience` and `rtt` may be set."""
    return swarm._connection.directory


def server_facts(swarm: Swarm, peer: str) -> dict[str, Any]:
    """What a server says of itself now."""
    connection = swarm._connection
    return connection._run(connection.directory.info(peer))


def forget_failures(swarm: Swarm) -> None:
    """No server is avoided for what it did before."""
    swarm._connection.directory.health._apart.clear()
