"""The servers that a token passes, in order, and how long each is expected to take.

`RouteTable` is made by `Swarm.route()` of what the client knows; it shows itself as `status` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from swarm_notebook.client.servers.routing import block_runs, token_seconds
from swarm_notebook.report.base import ModelReport
from swarm_notebook.report.formatting import data_frame, text_table
from swarm_notebook.report.html import block_bar, head, number_cell, peer_cell, table, view
from swarm_notebook.texts import HERE, clean

if TYPE_CHECKING:
    import pandas as pd

    from swarm_notebook.client.servers.directory import Directory

_COLUMNS = ["blocks", "name", "peer_id", "expected_ms"]


@dataclass(frozen=True)
class RouteHop:
    """Blocks ``[start, end)`` of the route, computed by one server, or here (no peer id)."""

    start: int
    end: int
    peer_id: str
    name: str
    expected_ms: float  # per token: network and blocks; the last one's include the way back; 0 here

    @property
    def blocks(self) -> str:
        return f"{self.start}:{self.end}"

    @property
    def time(self) -> str:
        """Milliseconds, for people; nothing is expected of blocks at home."""
        return f"{self.expected_ms:.1f}" if self.peer_id else ""


@dataclass(frozen=True)
class RouteTable(ModelReport):
    """The servers that a token passes, in order."""

    model: str
    hops: tuple[RouteHop, ...]

    @property
    def expected_ms(self) -> float:
        """Expected milliseconds per token, over all hops."""
        return sum(hop.expected_ms for hop in self.hops)

    def to_pandas(self) -> pd.DataFrame:
        """The hops as a data frame, one row each."""
        rows = [{name: getattr(hop, name) for name in _COLUMNS} for hop in self.hops]
        return data_frame(rows, _COLUMNS)

    def __repr__(self) -> str:
        hops = " -> ".join(f"{clean(hop.name)} [{hop.blocks}]" for hop in self.hops)
        return f"{self.title}: {hops or 'no route'}"

    def __str__(self) -> str:
        rows = [[hop.blocks, hop.name, hop.peer_id or None, hop.time or None] for hop in self.hops]
        table = text_table(["blocks", "server", "peer", "ms/token"], rows)
        return "\n".join([f"{self.title}: {self.expected_ms:.1f} ms/token expected", *table])

    def as_html(self) -> str:
        """The hops in order, each with its share of the blocks, as one static fragment."""
        expected = f"{self.expected_ms:.1f} ms per token expected"
        if not all(hop.peer_id for hop in self.hops):
            expected += ", beside the blocks at home"
        last = max((hop.end for hop in self.hops), default=1)
        rows = "".join(
            f"<tr><td>{block_bar(hop.start, hop.end, last)}{hop.blocks}</td>"
            f"<td>{escape(hop.name)}</td>{peer_cell(hop.peer_id) if hop.peer_id else '<td></td>'}"
            f"{number_cell(hop.time)}</tr>"
            for hop in self.hops
        )
        titles = ["blocks", "server", "peer"]
        return view(head(self.title, expected) + table(titles, ["ms/token"], [], rows))


def route_of(model: str, directory: Directory) -> RouteTable:
    """The servers that the client would ask now."""
    chain = directory.route()
    hops = [
        RouteHop(segment.start, segment.end, segment.peer, segment.span.name, 1000 * seconds)
        for segment, seconds in zip(chain, token_seconds(chain, directory.links), strict=True)
    ]
    hops += [RouteHop(start, end, "", HERE, 0.0) for start, end in block_runs(directory.home)]
    return RouteTable(model, tuple(sorted(hops, key=lambda hop: hop.start)))
