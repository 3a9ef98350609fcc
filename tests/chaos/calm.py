"""What servers take when nobody is there, before and after."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from chaos.servers import Server
from swarm_notebook.server.app import EXPIRE_SECONDS

# What may stay: code that was first needed late, a stream from server to server.
MEMORY_MARGIN = 16 << 20
FILES_MARGIN = 4
# An idle server gives back what its allocator keeps when it has seen that nobody asks for anything.
TIDY = 2 * EXPIRE_SECONDS + 1
HELD = ("sessions", "activation_bytes_held", "cache_tokens_held")


def taken(servers: Sequence[Server], told: Mapping[str, Mapping[str, int]]) -> dict[int, Any]:
    """What each server takes of the machine, with what it has told of itself by peer id.

    Those that have told nothing, or have ended, are missing.
    """
    time.sleep(TIDY)
    found = {}
    for server in servers:
        if not server.running or server.peer_id not in told:
            continue
        process, facts = psutil.Process(server.pid), told[server.peer_id]
        found[server.number] = {
            **{name: facts[name] for name in HELD},
            "restarts": server.restarts,
            "memory": process.memory_info().rss,
            "files": process.num_fds(),
        }
    return found


def compare(
    servers: Sequence[Server], before: Mapping[int, Any], after: Mapping[int, Any]
) -> list[str]:
    """What did not go back to where it was; after what `taken` has found of these servers."""
    wrong = []
    for server in servers:
        number = server.number
        if number not in before or number not in after:
            wrong.append(f"server {number} did not answer when all was calm: {server.said()}")
            continue
        was, now = before[number], after[number]
        wrong += [f"server {number}: {name} is {now[name]}" for name in HELD if now[name]]
        if now["restarts"] > was["restarts"]:  # its memory ran out, and it is another process
            continue
        if now["memory"] > was["memory"] + MEMORY_MARGIN:
            grown = (now["memory"] - was["memory"]) >> 20
            wrong.append(f"server {number}: {grown} MB more memory than after the warm-up")
        if now["files"] > was["files"] + FILES_MARGIN:
            wrong.append(f"server {number}: {now['files']} open files, {was['files']} before")
    return wrong
