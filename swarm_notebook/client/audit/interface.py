"""What the rest of the client knows of audits: whom to tell of finished work, how they ended."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from swarm_notebook.client.servers.routing import RouteSegment


class Outcomes(NamedTuple):
    """How many audits of a server ended in which way."""

    agreed: int = 0
    wrong: int = 0
    open: int = 0


class Audits(Protocol):
    """Takes note of finished work, to audit some of it in the background (`client.audit`).

    Attributes:
        positions: of how many of the last positions of a pass it needs the answers at least.
    """

    positions: int

    def step(self, history: Any) -> None:
        """A step of the session with this history has come back."""

    def forwarded(
        self, segment: RouteSegment, request: Any, answer: torch.Tensor, kept: bool
    ) -> None:
        """A server has answered its part of a forward pass without a cache."""

    def went_back(
        self, segment: RouteSegment, request: Any, grad: torch.Tensor, found: Any
    ) -> None:
        """A server has answered its part of a backward pass."""

    def disputed(
        self, sender: RouteSegment, receiver: RouteSegment, history: Any, why: str
    ) -> None:
        """What one server says it has handed to another is not what that one says it got.

        Args:
            sender, receiver: with the blocks that they computed.
            history: of the session in whose latest pass it was.
        """

    def outcomes(self, peer: str) -> Outcomes:
        """What audits of a server have found so far; called from any thread."""
