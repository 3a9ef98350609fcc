"""What a swarm looks like at one moment: who serves which blocks.

`SwarmStatus` is plain facts, made by `Swarm.status()` of what the client knows and never changed
afterwards. It shows itself three ways, as all reports do:

- HTML in a notebook, which follows the theme, light or dark;
- ``repr``: plain text with nothing that changes from run to run (no peer ids, no timings), so that
  saved notebooks can be compared with a fresh run;
- ``str`` (what ``print`` shows): plain text with everything that is known.

Blocks are written as Python slices are: ``0:15`` is blocks 0 to 14. Text from servers (names,
versions) is hostile: it is escaped in HTML and stripped of control characters in text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

from swarm_notebook.client.audit.interface import Outcomes
from swarm_notebook.client.servers.routing import block_runs, describe_blocks
from swarm_notebook.net.dht.records import ServerSpan, ServerState
from swarm_notebook.net.wire.tensors import COMPRESSIONS
from swarm_notebook.report.base import ModelReport
from swarm_notebook.report.formatting import (
    UNKNOWN,
    count,
    data_frame,
    duration,
    number,
    runs,
    text_table,
)
from swarm_notebook.report.html import block_bar, head, number_cell, peer_cell, table, view
from swarm_notebook.texts import HERE, clean

if TYPE_CHECKING:
    import pandas as pd

    from swarm_notebook.client.servers.directory import Directory
    from swarm_notebook.client.servers.snapshot import Snapshot

_COLUMNS = [
    "name",
    "peer_id",
    "blocks",
    "state",
    "rtt",
    "throughput",
    "dtype",
    "quant",
    "bits",
    "error",
    "perplexity",
    "engine",
    "reproducible",
    "cache_left",
    "version",
    "note",
]
_AUDITS = [f"audits_{outcome}" for outcome in Outcomes._fields]
# States of which there is nothing to worry; all others are of servers that are avoided.
_CALM = ("online", "joining", "offline")


@dataclass(frozen=True)
class ServerRow:
    """One server and its blocks ``[start, end)``. What it did not announce is None."""

    name: str
    peer_id: str
    start: int
    end: int
    state: str  # online, joining, offline, or why it is avoided: the kind of a `Fault`
    rtt: float | None = None  # seconds, measured
    block_rps: float | None = None  # tokens per second through one block, announced
    dtype: str | None = None
    quant: str | None = None
    cache_left: int | None = None  # tokens
    cache_total: int | None = None
    version: str | None = None
    note: str = ""  # what happened, if it is avoided
    retry: float | None = None  # Unix time when it is tried again, if it is avoided for a while
    announced: float | None = None  # Unix time when what it says of itself was first read
    heard: float | None = None  # Unix time when it last answered anything
    bits: float | None = None  # per weight of its blocks' matrices, if they were packed
    error: float | None = None  # of its blocks' outputs for that, relative to their mean square
    engine: str | None = None  # how its steps run, with the reason: "plain: …", announced
    reproducible: bool = False  # what a session gets does not depend on who else is served
    perplexity: float | None = None  # the whole model's at these bits, by that of whole weights
    audits: Outcomes | None = None  # None where nothing is audited

    @property
    def blocks(self) -> str:
        return f"{self.start}:{self.end}"

    @property
    def engine_kind(self) -> str | None:
        """How its steps run, in a word or two: `engine` without the reason."""
        kind = self.engine and self.engine.partition(":")[0]
        return f"{kind or UNKNOWN}, reproducible" if self.reproducible else kind

    @property
    def condition(self) -> str:
        """The state, and in how long it is tried again: ``unreachable (retrying in 3 s)``."""
        if self.retry is None:
            return self.state
        seconds = round(self.retry - time.time())
        return f"{self.state} (retrying {f'in {seconds} s' if seconds > 0 else 'now'})"

    @property
    def audited(self) -> str:
        """What audits of it have found, in words: ``12 agreed, 1 open``."""
        if self.audits is None:
            return UNKNOWN
        agreed, wrong, undecided = self.audits
        parts = [f"{agreed} agreed"] if agreed or not any(self.audits) else []
        parts += [f"{wrong} WRONG"] if wrong else []
        return ", ".join([*parts, *([f"{undecided} open"] if undecided else [])])

    @property
    def throughput(self) -> float | None:
        """Tokens per second through all its blocks."""
        return self.block_rps and self.block_rps / max(self.end - self.start, 1)

    @property
    def precision(self) -> str | None:
        """The dtype, with the quantisation if there is one, and what was measured of it."""
        if self.bits is not None:
            measured = "" if self.error is None else f", error {self.error:.1%}"
            return f"{self.dtype}, {self.bits:.3g} bits{measured}"
        quantised = self.quant not in (None, "none")
        return f"{self.dtype} ({self.quant})" if quantised else self.dtype

    @property
    def loss(self) -> str | None:
        """`precision`, and by how much perplexity grows, if the server's machine measured that."""
        ratio = "" if self.perplexity is None else f", perplexity x {self.perplexity:.3g}"
        return self.precision and self.precision + ratio


@dataclass(frozen=True)
class SwarmStatus(ModelReport):
    """All servers of one model."""

    model: str
    num_blocks: int
    servers: tuple[ServerRow, ...]
    read: float | None = None  # Unix time when the servers' records were read
    compression: str | None = None  # of hidden states between machines, if the user wants it
    home: tuple[int, ...] = ()  # blocks that run in the notebook

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
    def strip(self) -> list[tuple[int, int, int | None]]:
        """`coverage`, with None for blocks at home that no server has: they need none."""
        counts = enumerate(self.servers_per_block)
        return runs([count or (None if at in self.home else 0) for at, count in counts])

    @property
    def home_runs(self) -> list[tuple[int, int]]:
        """The blocks that run in the notebook, as ``(start, end)``."""
        return block_runs(self.home)

    @property
    def missing(self) -> list[int]:
        """The blocks that no server holds and that are not at home."""
        counts = enumerate(self.servers_per_block)
        return [block for block, count in counts if count == 0 and block not in self.home]

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
        online = sum(row.state == "online" for row in self.servers)
        servers = f"{count(online, 'server')} online"
        if self.missing:
            return f"{servers}, MISSING {describe_blocks(self.missing)}: no server"
        packed = f", hidden states travel as {self.compression}" if self.compression else ""
        if self.home:
            blocks = describe_blocks(self.home)
            return f"{servers}, {blocks} in {HERE}, the others served{packed}"
        return f"{servers}, all {self.num_blocks} blocks served{packed}"

    def to_pandas(self) -> pd.DataFrame:
        """The servers as a data frame, one row each."""
        rows = [
            [*(getattr(row, name) for name in _COLUMNS), *(row.audits or [None] * len(_AUDITS))]
            for row in self.servers
        ]
        return data_frame(rows, [*_COLUMNS, *_AUDITS])

    def __repr__(self) -> str:
        rows = [[row.name, row.blocks, row.state, row.precision] for row in self.servers]
        table = text_table(["server", "blocks", "state", "dtype"], rows)
        return "\n".join([f"{self.title}: {self.headline}", *table])

    @property
    def _audited(self) -> bool:
        return any(row.audits is not None for row in self.servers)

    def __str__(self) -> str:
        head = [
            "server",
            "peer",
            "blocks",
            "state",
            "round-trip",
            "tokens/s",
            "dtype",
            "engine",
            "cache-left",
            "version",
        ]
        head += ["audits", "note"] if self._audited else ["note"]
        rows = [
            [
                row.name,
                row.peer_id,
                row.blocks,
                row.condition,
                duration(row.rtt),
                number(row.throughput),
                row.loss,
                row.engine_kind,
                number(row.cache_left),
                row.version,
                *([row.audited] if self._audited else []),
                row.note or None,
            ]
            for row in self.servers
        ]
        per_block = ", ".join(f"{start}:{end} x{count}" for start, end, count in self.coverage)
        return "\n".join(
            [
                f"{self.title}: {self.headline}",
                *text_table(head, rows),
                *_reasons(self.servers),
                f"servers per block: {per_block}",
            ]
        )

    def as_html(self) -> str:
        """The headline, the strip of blocks and the servers, as one static fragment."""
        first = head(self.title, self.headline, alarm=bool(self.missing))
        titles = ["server", "peer", "blocks", "state"]
        numbers = ["round trip", "tokens/s", "cache left"]
        rows = "".join(_html_row(row, self.num_blocks, self._audited) for row in self.servers)
        more = ["dtype", "engine", "version", *(["audits"] if self._audited else [])]
        return view(first + _strip(self) + table(titles, numbers, more, rows))


def status_of(model: str, directory: Directory) -> SwarmStatus:
    """What the client knows now."""
    snapshot = directory.snapshot
    rows = tuple(_server_row(span, snapshot, directory) for span in snapshot.spans)
    named = (word for word, kind in COMPRESSIONS.items() if kind == directory.compression)
    compression, home = next(named, None), tuple(sorted(directory.home))
    return SwarmStatus(model, directory.num_blocks, rows, snapshot.when, compression, home)


def _server_row(span: ServerSpan, snapshot: Snapshot, directory: Directory) -> ServerRow:
    info, fault = span.info, directory.fault(span.peer)
    retry = fault.retry if fault is not None else None
    return ServerRow(
        name=span.name,
        peer_id=span.peer,
        start=span.start,
        end=span.end,
        state=fault.kind if fault is not None else ServerState(info.state).name.lower(),
        rtt=directory.rtt.get(span.peer),
        block_rps=info.inference_rps,
        dtype=info.torch_dtype,
        quant=info.quant_type,
        cache_left=span.cache_left,
        cache_total=info.cache_tokens_total,
        version=info.version,
        note=fault.reason if fault is not None else "",
        retry=None if retry is None else round(time.time() + retry - time.monotonic()),
        announced=snapshot.announced.get(span.peer),
        heard=directory.heard.get(span.peer),
        bits=info.weight_bits,
        error=info.weight_error,
        engine=info.engine,
        reproducible=bool(info.reproducible),
        perplexity=info.weight_perplexity,
        audits=None if directory.audits is None else directory.audits.outcomes(span.peer),
    )


def _reasons(servers: Sequence[ServerRow]) -> list[str]:
    """Why servers run steps as they do; once for all that say the same."""
    names: dict[str, list[str]] = {}
    for row in servers:
        if row.engine is not None and ":" in row.engine:
            names.setdefault(row.engine, []).append(row.name)
    return [clean(f"engine of {', '.join(who)}: {engine}") for engine, who in names.items()]


def _strip(status: SwarmStatus) -> str:
    """Neighbouring blocks with as many servers as one bar; red where there is none."""
    bars = []
    for start, end, servers in status.strip:
        label = "home" if servers is None else f"&times;{servers}" if servers else "none"
        where = f"in {HERE}" if servers is None else count(servers, "server")
        title = f"blocks {start}:{end}: {where}"
        kind = 2 if servers is None else min(servers, 2)
        bars.append(
            f'<div class="sn-run sn-{kind}" style="flex:{end - start}" '
            f'title="{title}">{start}:{end} {label}</div>'
        )
    return f'<div class="sn-strip">{"".join(bars)}</div>'


def _html_row(row: ServerRow, num_blocks: int, audited: bool) -> str:
    dot = f'<span class="sn-dot sn-{row.state if row.state in _CALM else "bad"}"></span>'
    note = f'<div class="sn-note sn-dim">{escape(row.note)}</div>' if row.note else ""
    return (
        f"<tr><td>{escape(row.name)}</td>{peer_cell(row.peer_id)}"
        f"<td>{block_bar(row.start, row.end, num_blocks)}{row.blocks}</td>"
        f"<td>{dot}{escape(row.condition)}{note}</td>"
        f"{number_cell(duration(row.rtt))}{number_cell(number(row.throughput))}"
        f"{number_cell(number(row.cache_left))}"
        f"<td>{escape(row.loss or UNKNOWN)}</td>"
        f'<td title="{escape(row.engine or "")}">{escape(row.engine_kind or UNKNOWN)}</td>'
        f"<td>{escape(row.version or UNKNOWN)}</td>"
        f"{f'<td>{row.audited}</td>' if audited else ''}</tr>"
    )
