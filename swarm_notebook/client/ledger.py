"""What each server got from this notebook, and gave: bytes, requests, tokens, seconds. Pure code.

Kept for as long as the notebook is attached, whatever became of the server since: a peer that has
once received activations has seen them. The network thread writes; other threads read copies.
Waiting for several servers at once counts for each of them, so seconds may add up to more than
passed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from swarm_notebook.net.streams import ByteMeter

if TYPE_CHECKING:
    from swarm_notebook.client.servers.routing import RouteSegment
    from swarm_notebook.client.telemetry import Step

SMOOTHING = 0.3


@dataclass
class Account:
    """One server's part.

    Attributes:
        name: what it calls itself.
        meter: bytes on its streams.
        requests: how many it has answered.
        tokens: tokens times sequences that went through it, once per pass.
        seconds: of waiting for its answers.
        last: when it was last asked, in seconds of Unix time.
        blocks: the spans for which it was asked.
        token_seconds: how long one token takes there and back, smoothed, by span.
    """

    name: str = ""
    meter: ByteMeter = field(default_factory=ByteMeter)
    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0
    last: float = 0.0
    blocks: set[tuple[int, int]] = field(default_factory=set)
    token_seconds: dict[tuple[int, int], float] = field(default_factory=dict)

    def copy(self) -> Account:
        """As it is now, for another thread."""
        return replace(
            self,
            meter=replace(self.meter),
            blocks=set(self.blocks),
            token_seconds=dict(self.token_seconds),
        )


class Ledger:
    """The accounts of all servers that were asked since the notebook was attached."""

    def __init__(self) -> None:
        self._accounts: defaultdict[str, Account] = defaultdict(Account)

    def open(self, segment: RouteSegment) -> ByteMeter:
        """A stream to this server begins: what counts its bytes."""
        account = self._accounts[segment.peer]
        account.name, account.last = segment.span.name, time.time()
        account.blocks.add((segment.start, segment.end))
        return account.meter

    def passed(self, step: Step) -> None:
        """A step of a session went through its servers."""
        now, tokens = time.time(), step.tokens * step.rows
        for hop in step.hops:
            account = self._accounts[hop.peer]
            seconds = hop.serialisation + hop.network + hop.queue + hop.compute
            account.tokens += tokens
            account.seconds += seconds
            account.last = now
            if tokens == 1:
                span = (hop.start, hop.end)
                known = account.token_seconds.get(span, seconds)
                account.token_seconds[span] = known + SMOOTHING * (seconds - known)

    def received(self, segment: RouteSegment) -> None:
        """A request of a session was answered; what it took comes with the step."""
        self._accounts[segment.peer].requests += 1

    def answered(self, segment: RouteSegment, tokens: int, seconds: float) -> None:
        """A request without a session was answered."""
        account = self._accounts[segment.peer]
        account.requests += 1
        account.tokens += tokens
        account.seconds += seconds
        account.last = time.time()

    def accounts(self) -> dict[str, Account]:
        """Copies, by peer."""
        return {peer: account.copy() for peer, account in list(self._accounts.items())}
