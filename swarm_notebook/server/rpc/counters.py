"""Counts of what a server has computed since its start, which ``rpc_info`` tells."""

from __future__ import annotations

from dataclasses import dataclass

from swarm_notebook.server.engine.requests import Forward


@dataclass
class Counters:
    """Sessions begun, answered requests, and the tokens of all sequences in them."""

    sessions: int = 0
    requests: int = 0
    tokens: int = 0

    def count(self, request: Forward) -> None:
        """A request was computed."""
        self.requests += 1
        self.tokens += request.rows * request.length
