"""What a swarm looks like at one moment: who serves which blocks, and the way a token takes.

`SwarmStatus` and `RouteTable` are plain facts, made by `Swarm.status()` and `Swarm.route()` and
never changed afterwards. Each shows itself three ways:

- HTML in a notebook (`status_html`), which follows the theme, light or dark;
- ``repr``: plain text with nothing that changes from run to run (no peer ids, no timings), so that
  saved notebooks can be compared with a fresh run;
- ``str`` (what ``print`` shows): plain text with everything that is known.

Blocks are written as Python slices are: ``0:15`` is blocks 0 to 14. Text from servers (names,
versions) is hostile: it is escaped in HTML and stripped of control characters in text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from swarm_notebook.client.servers.routing import block_slices
from swarm_notebook.report import status_html
from swarm_notebook.report.formatting import (
    clean,
    milliseconds,
    model_title,
    number,
    runs,
    text_table,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ServerRow:
    """One server and its blocks ``[start, end)``. What it did not announce is None."""

    name: str
    peer_id: str
    start: int
    end: int
    state: str  # online, joining, offline, or avoided: it failed just now, see `note`
    rtt: float | None = None  # seconds, measured
    block_rps: float | None = None  # tokens per second through one block, announced
    dtype: str | None = None
    quant: str | None = None
    cache_left: int | None = None  # tokens
    cache_total: int | None = None
    version: str | None = None
    note: str = ""
    announced: float | None = None  # Unix time when what it says of itself was first read
    heard: float | None = None  # Unix time when it last answered anything

    @property
    def blocks(self) -> str:
        return f"{self.start}:{self.end}"

    @property
    def throughput(self) -> float | None:
        """Tokens per second through all its blocks."""
        return self.block_rps and self.block_rps / max(self.end - self.start, 1)

    @property
    def precision(self) -> str | None:
        """The dtype, with the quantisation if there is one."""
        quantised = self.quant not in (None, "none")
        return f"{self.dtype} ({self.quant})" if quantised else self.dtype


@dataclass(frozen=True)
class SwarmStatus:
    """All servers of one model."""

    model: str
    num_blocks: int
    servers: tuple[ServerRow, ...]
    read: float | None = None  # Unix time when the servers' records were read
    compression: str | None = None  # of hidden states on their way, if the user wants it

    @property
    def title(self) -> str:
        """The model's name, without the folder that it was read from."""
        return model_title(self.model)

    @cached_property
    def servers_per_block(self) -> list[int]:
        """For each block, how many servers can be asked for it now."""
        counts = [0] * self.num_blocks
        for row in self.servers:
            if row.state == "online":
                for block in range(row.start, min(row.end, self.num_blocks)):
                    counts[block] += 1
        return counts

    @property
    def coverage(self) -> list[tuple[int, int, int]]:
        """`servers_per_block` as runs: ``(start, end, count)``."""
        return runs(self.servers_per_block)

    @property
    def missing(self) -> list[int]:
        """The blocks that no server holds."""
        return [block for block, count in enumerate(self.servers_per_block) if count == 0]

    def needed(self, peer_id: str) -> list[int]:
        """The blocks that this server alone can be asked for: what breaks if it leaves."""
        counts = self.servers_per_block
        mine = {
            block
            for row in self.servers
            if row.peer_id == peer_id and row.state == "online"
            for block in range(row.start, min(row.end, self.num_blocks))
        }
        return sorted(block for block in mine if counts[block] == 1)

    @property
    def headline(self) -> str:
        """One sentence: is the model whole?"""
        count = sum(row.state == "online" for row in self.servers)
        servers = f"{count} server{'' if count == 1 else 's'} online"
        if self.missing:
            return f"{servers}, MISSING blocks {block_slices(self.missing)}: nobody serves them"
        packed = f", hidden states travel as {self.compression}" if self.compression else ""
        return f"{servers}, all {self.num_blocks} blocks served{packed}"

    def to_pandas(self) -> pd.DataFrame:
        """The servers as a data frame, one row each."""
        columns = "name peer_id blocks state rtt throughput dtype quant cache_left version note"
        return _frame(self.servers, columns.split())

    def __repr__(self) -> str:
        rows = [[row.name, row.blocks, row.state, row.precision] for row in self.servers]
        table = text_table(["server", "blocks", "state", "dtype"], rows)
        return "\n".join([f"{self.title}: {self.headline}", *table])

    def __str__(self) -> str:
        head = "server peer blocks state round-trip tokens/s dtype cache-left version note"
        rows = [
            [
                row.name,
                row.peer_id,
                row.blocks,
                row.state,
                milliseconds(row.rtt),
                number(row.throughput),
                row.precision,
                number(row.cache_left),
                row.version,
                row.note or None,
            ]
            for row in self.servers
        ]
        per_block = ", ".join(f"{start}:{end} x{count}" for start, end, count in self.coverage)
        return "\n".join(
            [
                f"{self.title}: {self.headline}",
                *text_table(head.split(), rows),
                f"servers per block: {per_block}",
            ]
        )

    def _repr_mimebundle_(self, **_options: Any) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": status_html.status(self)}


@dataclass(frozen=True)
class RouteHop:
    """Blocks ``[start, end)`` of the route, computed by one server."""

    start: int
    end: int
    peer_id: str
    name: str
    expected_ms: float  # per token: network and blocks; the last one's include the way back

    @property
    def blocks(self) -> str:
        return f"{self.start}:{self.end}"


@dataclass(frozen=True)
class RouteTable:
    """The servers that a token passes, in order."""

    model: str
    hops: tuple[RouteHop, ...]

    @property
    def title(self) -> str:
        """The model's name, without the folder that it was read from."""
        return model_title(self.model)

    @property
    def expected_ms(self) -> float:
        """Expected milliseconds per token, over all hops."""
        return sum(hop.expected_ms for hop in self.hops)

    def to_pandas(self) -> pd.DataFrame:
        """The hops as a data frame, one row each."""
        return _frame(self.hops, ["blocks", "name", "peer_id", "expected_ms"])

    def __repr__(self) -> str:
        way = " -> ".join(f"{clean(hop.name)} [{hop.blocks}]" for hop in self.hops)
        return f"{self.title}: {way or 'no route'}"

    def __str__(self) -> str:
        rows = [[hop.blocks, hop.name, hop.peer_id, f"{hop.expected_ms:.1f}"] for hop in self.hops]
        table = text_table(["blocks", "server", "peer", "ms/token"], rows)
        return "\n".join([f"{self.title}: {self.expected_ms:.1f} ms/token expected", *table])

    def _repr_mimebundle_(self, **_options: Any) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": status_html.route(self)}


def _frame(rows: Sequence[object], columns: list[str]) -> pd.DataFrame:
    return data_frame(
        [{column: getattr(row, column) for column in columns} for row in rows], columns
    )


def data_frame(rows: Sequence[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    """Rows as a data frame; says what to install if that cannot be."""
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "to_pandas() needs pandas: pip install 'swarm-notebook[pandas]'", name="pandas"
        ) from error
    return pd.DataFrame(rows, columns=columns)
