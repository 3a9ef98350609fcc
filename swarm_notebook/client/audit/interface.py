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
    """Takes note of finished work, to audit some of it in the background (`client.audit`)."""

    def more_asked(
        self, segment: RouteSegment, rows: int, length: int, states: int
    ) -> tuple[int, float]:
        """Of how many of a prompt's last positions to ask for the answers, and how often.

        Args:
            segment: the last server of the chain.
            rows, length: of the prompt.
            states: that travel for each row anyhow.

        Returns:
            the number of positions, and in which share of such prompts to ask for them.
        """

    def draw_asked(self, share: float) -> bool:
        """Whether this prompt is among so many of them."""

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

    def convicted(self, liar: RouteSegment, why: str) -> None:
        """A server has lied about a hand-over, and signatures say so."""

    def outcomes(self, peer: str) -> Outcomes:
        """What audits of a server have found so far; called from any thread."""
