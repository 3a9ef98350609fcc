"""What a generation will take, and what has been used: requests, bytes, seconds, who sees what.

`Preview` is made by `Swarm.preview` before a run, `Bill` by `Swarm.bill` after it; both are plain
facts that never change. Bills of two moments subtract: ``swarm.bill() - before`` is what a run
took. Each shows itself as `status` does, and has a `line` for where there is room for one.

A server sees the activations of every token that passes it. They are no text, but text can be
guessed from them: a peer on the bill has seen what this notebook does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING

from swarm_notebook.client.servers.routing import (
    Links,
    block_slices,
    describe_blocks,
    network_seconds,
    prompt_seconds,
    token_seconds,
)
from swarm_notebook.client.session.pipeline import part_count
from swarm_notebook.report.base import ModelReport
from swarm_notebook.report.formatting import (
    count,
    duration,
    number,
    size,
    text_table,
)
from swarm_notebook.report.html import facts, head, number_cell, table, view
from swarm_notebook.texts import clean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from swarm_notebook.client.servers.routing import RouteSegment
    from swarm_notebook.client.telemetry import ServerUsage

# Beyond hidden states, a request has ids, positions and frames, and an answer has timings.
REQUEST_BYTES, ANSWER_BYTES = 203, 66


@dataclass(frozen=True)
class Preview(ModelReport):
    """What a generation is expected to take, on the route that a new request would take now.

    Seconds are those of the servers and the network; the notebook's own work comes on top.

    Attributes:
        servers: names of the servers on the route, in its order; each will see the activations.
        requests: to all servers together.
        sent: bytes that the notebook sends.
        received: bytes that it receives.
        first_token_seconds: until the prompt has passed.
        seconds: until the end.
        measured: the speed is that of earlier tokens on this route, not what the servers announce.
        home: blocks that run in the notebook.
        home_bytes: of their weights.
    """

    model: str
    prompt_tokens: int
    max_new_tokens: int
    batch: int
    servers: tuple[str, ...]
    requests: int
    sent: int
    received: int
    first_token_seconds: float
    seconds: float
    measured: bool
    home: tuple[int, ...] = ()
    home_bytes: int = 0

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"{self._amount}, about {duration(self.seconds)}"

    @property
    def _amount(self) -> str:
        return (
            f"{count(self.requests, 'request')} to {count(len(self.servers), 'server')}, "
            f"{size(self.sent)} up, {size(self.received)} down"
        )

    def __repr__(self) -> str:
        return f"{self.title}: {self._amount}"

    def __str__(self) -> str:
        basis = "measured on this route" if self.measured else "as the servers announce their speed"
        lines = [
            f"{self.title}: {self.line}",
            f"  first token after about {duration(self.first_token_seconds)} ({basis})",
            f"  seen by {', '.join(map(clean, self.servers))}",
        ]
        if self.home:
            lines.append(f"  at home {self._at_home}")
        return "\n".join(lines)

    @property
    def _at_home(self) -> str:
        return f"{describe_blocks(self.home)}, {size(self.home_bytes)} of weights"

    def as_html(self) -> str:
        """The estimate as a table of facts, as one static fragment."""
        basis = "measured on this route" if self.measured else "by the announced speed"
        rows = [
            ("tokens", f"{self.prompt_tokens} + up to {self.max_new_tokens} new"),
            ("requests", f"{number(self.requests)} to {count(len(self.servers), 'server')}"),
            ("bytes", f"{size(self.sent)} up, {size(self.received)} down"),
            ("first token", f"about {duration(self.first_token_seconds)}"),
            ("total", f"about {duration(self.seconds)} ({basis})"),
            ("seen by", ", ".join(self.servers)),
        ]
        if self.home:
            rows.append(("at home", self._at_home))
        if self.batch != 1:
            rows.insert(1, ("sequences", number(self.batch)))
        return view(head(self.title, "estimate") + facts(rows))


@dataclass(frozen=True)
class ServerBill:
    """One server's part of a bill.

    Attributes:
        blocks: the spans that it was asked for, each as ``(start, end)``.
        requests: how many it answered.
        tokens: tokens times sequences that went through it, once per pass.
        sent, received: bytes.
        seconds: of waiting for it.
        last: when it was last asked, in seconds of Unix time.
    """

    name: str
    peer_id: str
    blocks: tuple[tuple[int, int], ...]
    requests: int
    tokens: int
    sent: int
    received: int
    seconds: float
    last: float

    def since(self, before: ServerBill) -> ServerBill:
        """What was used of it since an earlier bill."""
        names = ("requests", "tokens", "sent", "received", "seconds")
        return replace(self, **{one: getattr(self, one) - getattr(before, one) for one in names})


@dataclass(frozen=True)
class Bill(ModelReport):
    """What has been used; ``after - before`` is what was used in between.

    Attributes:
        servers: those that were asked; every one of them has seen activations.
    """

    model: str
    servers: tuple[ServerBill, ...]

    @property
    def requests(self) -> int:
        return sum(server.requests for server in self.servers)

    @property
    def sent(self) -> int:
        return sum(server.sent for server in self.servers)

    @property
    def received(self) -> int:
        return sum(server.received for server in self.servers)

    @property
    def seconds(self) -> float:
        """Seconds of waiting, summed over the servers."""
        return sum(server.seconds for server in self.servers)

    @property
    def line(self) -> str:
        """All of it in one line."""
        return (
            f"{count(self.requests, 'request')} to {count(len(self.servers), 'server')}, "
            f"{size(self.sent)} up, {size(self.received)} down, "
            f"{duration(self.seconds)} waiting for servers"
        )

    def __sub__(self, before: Bill) -> Bill:
        known = {server.peer_id: server for server in before.servers}
        rest = [
            server if server.peer_id not in known else server.since(known[server.peer_id])
            for server in self.servers
        ]
        return replace(self, servers=tuple(server for server in rest if server.sent))

    def __repr__(self) -> str:
        return (
            f"{self.title}: {count(self.requests, 'request')} to "
            f"{count(len(self.servers), 'server')}"
        )

    def __str__(self) -> str:
        titles = ["server", "blocks", "requests", "tokens", "sent", "received", "waited"]
        rows = [_cells(server) for server in self.servers]
        return "\n".join([f"{self.title}: {self.line}", *text_table(titles, rows)])

    def as_html(self) -> str:
        """The servers and what was used of them, as one static fragment."""
        rows = ""
        for server in self.servers:
            name, blocks, *numbers = _cells(server)
            cells = "".join(map(number_cell, numbers))
            rows += f"<tr><td>{escape(name)}</td><td>{blocks}</td>{cells}</tr>"
        titles = ["requests", "tokens", "sent", "received", "waited"]
        listed = table(["seen by", "blocks"], titles, [], rows)
        return view(head(self.title, self.line) + listed)


def expect(
    model: str,
    chain: Sequence[RouteSegment],
    links: Links,
    usage: Mapping[str, ServerUsage],
    *,
    loads: Sequence[tuple[int, int]],
    prompt_tokens: int,
    answered: int,
    max_new_tokens: int,
    batch: int,
    home: Mapping[int, int] | None = None,
) -> Preview:
    """The preview of a generation over a chain of servers.

    Args:
        links: how far notebook and servers are from each other.
        usage: what earlier tokens took, by peer.
        loads: bytes of one token's hidden state to and from each server of the chain; zero where
            it comes from the server before.
        answered: of how many positions of the prompt the last server sends its output back.
        home: bytes of the weights of blocks that run in the notebook.
    """
    given = {"prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens, "batch": batch}
    for name, amount in given.items():
        if amount < 1:
            raise ValueError(f"{name}: {amount}, expected at least 1")
    known = [_token_seconds(segment, usage) for segment in chain]
    each = [
        announced if measured is None else measured
        for announced, measured in zip(token_seconds(chain, links), known, strict=True)
    ]
    first = sum(
        max(seconds, network + prompt_tokens * batch * prompt_seconds(segment))
        for segment, seconds, network in zip(
            chain, each, network_seconds(chain, links), strict=True
        )
    )
    parts = part_count(prompt_tokens, batch, [segment.span for segment in chain])
    requests = (parts + max_new_tokens - 1) * len(chain)
    tokens = (prompt_tokens + max_new_tokens - 1) * batch
    kept_back = (prompt_tokens - answered) * batch * (loads[-1][1] if loads else 0)
    return Preview(
        model,
        prompt_tokens,
        max_new_tokens,
        batch,
        tuple({segment.peer: segment.span.name for segment in chain}.values()),
        requests,
        tokens * sum(up for up, _ in loads) + requests * REQUEST_BYTES,
        tokens * sum(down for _, down in loads) - kept_back + requests * ANSWER_BYTES,
        first,
        first + (max_new_tokens - 1) * sum(each),
        all(measured is not None for measured in known),
        tuple(sorted(home or ())),
        sum((home or {}).values()),
    )


def bill_of(model: str, usage: Mapping[str, ServerUsage]) -> Bill:
    """The bill of what the client has counted."""
    servers = [
        ServerBill(
            used.name,
            peer,
            tuple(sorted(used.blocks)),
            used.requests,
            used.tokens,
            used.meter.sent,
            used.meter.received,
            used.seconds,
            used.last,
        )
        for peer, used in usage.items()
        if used.meter.sent
    ]
    return Bill(model, tuple(servers))


def _token_seconds(segment: RouteSegment, usage: Mapping[str, ServerUsage]) -> float | None:
    """What a token took on this segment so far, if any went there."""
    used = usage.get(segment.peer)
    return None if used is None else used.token_seconds.get((segment.start, segment.end))


def _cells(server: ServerBill) -> list[str]:
    return [
        server.name,
        # Hooks in between cut spans into parts of themselves: whoever had one has seen it all.
        block_slices(sorted({block for span in server.blocks for block in range(*span)})),
        number(server.requests),
        number(server.tokens),
        size(server.sent),
        size(server.received),
        duration(server.seconds),
    ]
