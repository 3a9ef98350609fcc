"""Counts of what a server has computed since its start, which ``rpc_info`` tells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from swarm_notebook.server.engine.requests import Forward

# Peers of which it is known when they came; a number takes about 200 bytes with its peer's name.
MOST_ARRIVALS = 4096


@dataclass
class Counters:
    """Sessions begun, answered requests, and the tokens of all sequences in them.

    Peers are numbered as they come, so that those who cannot know of each other choose differently
    (`client/servers/crowd.py`).
    """

    sessions: int = 0
    requests: int = 0
    tokens: int = 0
    _arrivals: dict[str, int] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def count(self, request: Forward) -> None:
        """A request was computed."""
        self.requests += 1
        self.tokens += request.rows * request.length

    def arrival(self, peer: str) -> int:
        """How many peers had come before this one."""
        if peer not in self._arrivals:
            self._arrivals[peer] = next(self._numbers)
            if len(self._arrivals) > MOST_ARRIVALS:
                del self._arrivals[next(iter(self._arrivals))]
        return self._arrivals[peer]
