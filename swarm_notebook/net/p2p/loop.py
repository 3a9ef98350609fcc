"""The asyncio loop in which a peer of the swarm lives."""

from __future__ import annotations

from typing import Any

import uvloop

# Streams that p2pd may hand over before the loop comes to take them. With asyncio's hundred, a
# flood of a second is cut off without a word: p2pd resets what it cannot hand over.
BACKLOG = 4096


class PeerLoop(uvloop.Loop):
    """A fast loop that bears a flood of streams, and can keep interrupts from its child processes.

    A Ctrl-C in the terminal and the kernel's interrupt go to a whole process group. p2pd, the child
    of this loop, would end at once, and with it the connections and the steps in flight.

    Args:
        detached: child processes get a session, and so a process group, of their own.
    """

    def __init__(self, *, detached: bool):
        super().__init__()
        self._detached = detached

    async def subprocess_exec(self, *arguments: Any, **options: Any) -> Any:
        options = {"start_new_session": self._detached, **options}
        return await super().subprocess_exec(*arguments, **options)

    async def create_unix_server(self, *arguments: Any, **options: Any) -> Any:
        return await super().create_unix_server(*arguments, **{"backlog": BACKLOG, **options})
