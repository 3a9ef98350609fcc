"""Where the time of a generation went: the notebook, the network and each server.

A `Trace` is made by `Swarm.trace()` from what the client recorded and never changed afterwards.
One *pass* sends tokens through all blocks: the prompt is the first, then there is one per token,
or one per verification if tokens are guessed ahead. It shows itself as `status` does: HTML with
a plot, ``repr`` without anything that changes from run to run, and ``str`` with everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from swarm_notebook.client.servers.routing import block_slices
from swarm_notebook.client.telemetry import HopTimes
from swarm_notebook.report.base import ModelReport
from swarm_notebook.report.formatting import count, data_frame, text_table
from swarm_notebook.report.html import head, number_cell, table, view
from swarm_notebook.report.palette import TIMES
from swarm_notebook.report.plot import LETTERS, nice_ticks
from swarm_notebook.texts import clean

if TYPE_CHECKING:
    import pandas as pd

    from swarm_notebook.client.telemetry import StepRecord, Timeline

PARTS = HopTimes._fields[4:]

# Room for labels in the larger type of narrow cells (`plot`).
WIDTH, HEIGHT, LEFT = 640, 120, 84
ROW, NAMES, NAME_LETTERS = 22, 176, 16
MAX_BARS = 160  # four pixels each
SPIKE = 1.25  # how far above the 95th percentile a bar may rise before it is cut


class ServerTimes(HopTimes):
    """A server's part in one pass, or in the mean of several."""

    __slots__ = ()

    @property
    def peer_id(self) -> str:
        """The server, as `status` names it."""
        return self.peer

    @property
    def blocks(self) -> str:
        return f"{self.start}:{self.end}"

    @property
    def seconds(self) -> float:
        return sum(self[4:])

    def scaled(self, share: float) -> ServerTimes:
        return ServerTimes(*self[:4], *(share * part for part in self[4:]))


@dataclass(frozen=True)
class PassTimes:
    """One pass through all blocks; seconds.

    Attributes:
        position: tokens that precede those of the pass.
        tokens: tokens per sequence in the pass.
        client: the notebook's own work: embeddings, head, choice of the token, and transformers.
        servers: in the order of their blocks.
    """

    position: int
    tokens: int
    client: float
    servers: tuple[ServerTimes, ...]

    @property
    def seconds(self) -> float:
        return self.client + sum(server.seconds for server in self.servers)

    def part(self, name: str) -> float:
        """One of `PARTS`, summed over the servers."""
        return sum(getattr(server, name) for server in self.servers)


@dataclass(frozen=True)
class Trace(ModelReport):
    """The passes of one generation.

    Attributes:
        failovers: servers that were lost meanwhile, and why.
        engines: how steps run on the servers, by peer, as they announce it.
        home: blocks that run in the notebook, whose time is a part of its own.
        written: tokens of each sequence that came out; None until the generation has ended.
    """

    model: str
    passes: tuple[PassTimes, ...]
    failovers: tuple[str, ...] = ()
    home: tuple[int, ...] = ()
    engines: Mapping[str, str] = field(default_factory=dict)
    written: int | None = None

    @property
    def tokens(self) -> int:
        """How many tokens of each sequence came out; until the end, without what is guessed."""
        if self.written is not None:
            return self.written
        if not self.passes:
            return 0
        first, last = self.passes[0], self.passes[-1]
        return last.position - first.position - first.tokens + 2 if last is not first else 1

    @property
    def first_token_seconds(self) -> float:
        """From the beginning to the end of the first pass."""
        return self.passes[0].seconds if self.passes else 0.0

    @property
    def mean(self) -> PassTimes | None:
        """The mean of all passes but the first, or None without any."""
        return _mean(self.passes[1:])

    @property
    def headline(self) -> str:
        """One sentence: how fast was it?"""
        if not self.passes:
            return "nothing generated yet"
        text = f"{self.shape}; first pass {_ms(self.first_token_seconds)}"
        later = self.passes[1:]
        if later:
            seconds = sum(one.seconds for one in later)
            rate = (self.tokens - 1) / seconds if seconds else 0.0
            text += f", then {_ms(seconds / len(later))} per pass, {rate:.1f} tokens/s"
        return text

    @property
    def shape(self) -> str:
        """What does not vary from run to run: tokens and passes."""
        passes = len(self.passes)
        lost = len(self.failovers)
        return (
            f"{count(self.tokens, 'token')} in {passes} pass{'' if passes == 1 else 'es'}"
            + (f", {count(lost, 'server')} lost on the way" if lost else "")
            + (f", blocks {block_slices(self.home)} in the notebook" if self.home else "")
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per pass and server; seconds."""
        rows = [
            {"pass": number, "position": one.position, "tokens": one.tokens, "client": one.client}
            | {"name": server.name, "peer_id": server.peer_id, "blocks": server.blocks}
            | {part: getattr(server, part) for part in PARTS}
            | {"engine": self.engines.get(server.peer_id)}
            for number, one in enumerate(self.passes)
            for server in one.servers
        ]
        columns = ["pass", "position", "tokens", "client", "name", "peer_id", "blocks"]
        return data_frame(rows, [*columns, *PARTS, "engine"])

    def __repr__(self) -> str:
        shown = self.mean or (self.passes[0] if self.passes else None)
        servers = [] if shown is None else shown.servers
        hops = " -> ".join(f"{clean(server.name)} [{server.blocks}]" for server in servers)
        return f"{self.title}: {self.shape}" + (f", through {hops}" if hops else "")

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.headline}"]
        if self.passes:
            head = ["ms per pass", "blocks", *PARTS, "total"]
            shown = self.mean or self.passes[0]
            lines += text_table(head, _rows(shown))
            lines += [clean(f"engine of {one}: {engine}") for one, engine in self._engines(shown)]
        return "\n".join([*lines, *(f"lost: {clean(reason)}" for reason in self.failovers)])

    def as_html(self) -> str:
        """The headline, a plot of all passes but the first; the mean one as a way and a table."""
        first = head(self.title, self.headline)
        lost = "".join(f'<div class="sn-alarm">{escape(reason)}</div>' for reason in self.failovers)
        shown = self.mean or (self.passes[0] if self.passes else None)
        body = (
            "" if shown is None else _plot(self.passes[1:]) + _waterfall(shown) + _html_table(shown)
        )
        engines = "".join(
            f'<div class="sn-dim">engine of {escape(name)}: {escape(engine)}</div>'
            for name, engine in ([] if shown is None else self._engines(shown))
        )
        return view(LETTERS + first + lost + body + engines)

    def _engines(self, shown: PassTimes) -> list[tuple[str, str]]:
        """The servers of a pass and how steps run there, once for all that say the same."""
        names: dict[str, dict[str, None]] = {}
        for server in shown.servers:
            engine = self.engines.get(server.peer_id, "unknown")
            names.setdefault(engine, {})[server.name] = None
        return [(", ".join(who), engine) for engine, who in names.items()]


def from_timeline(
    model: str,
    timeline: Timeline | None,
    home: tuple[int, ...] = (),
    engines: Mapping[str, str] | None = None,
) -> Trace:
    """The trace of what was recorded."""
    if timeline is None:
        return Trace(model, (), home=home)
    passes, before = [], timeline.began
    for step in list(timeline.steps):
        passes.append(_pass(step, before))
        before = step.ended
    reasons = tuple(lost.reason for lost in list(timeline.failovers))
    return Trace(model, tuple(passes), reasons, home, engines or {}, timeline.written)


def _pass(step: StepRecord, before: float) -> PassTimes:
    servers = tuple(ServerTimes(*hop) for hop in step.hops)
    elsewhere = sum(server.seconds for server in servers)
    if elsewhere > step.ended - before:
        # They worked at the same time, on parts of a long prompt: each gets its share.
        share = (step.ended - before) / elsewhere
        servers = tuple(server.scaled(share) for server in servers)
        elsewhere = step.ended - before
    return PassTimes(step.position, step.tokens, step.ended - before - elsewhere, servers)


def _mean(passes: Sequence[PassTimes]) -> PassTimes | None:
    """The mean pass; a server counts for each pass, also for those without it."""
    if not passes:
        return None
    count = len(passes)
    groups: dict[tuple[int, int, str], list[ServerTimes]] = {}
    for one in passes:
        for server in one.servers:
            groups.setdefault((server.start, server.end, server.peer), []).append(server)
    servers = tuple(_sum(found).scaled(1 / count) for _, found in sorted(groups.items()))
    last = passes[-1]
    client = sum(one.client for one in passes) / count
    return PassTimes(last.position, last.tokens, client, servers)


def _sum(found: Sequence[ServerTimes]) -> ServerTimes:
    """The parts of one server in several passes together."""
    parts = zip(*(one[4:] for one in found), strict=True)
    return ServerTimes(*found[0][:4], *map(sum, parts))


def _rows(one: PassTimes) -> list[list[str | None]]:
    rows: list[list[str | None]] = [
        ["notebook", None, None, None, None, None, f"{1000 * one.client:.2f}"]
    ]
    for server in one.servers:
        parts = [f"{1000 * getattr(server, part):.2f}" for part in PARTS]
        rows.append([server.name, server.blocks, *parts, f"{1000 * server.seconds:.2f}"])
    totals = [f"{1000 * one.part(part):.2f}" for part in PARTS]
    return [*rows, ["total", None, *totals, f"{1000 * one.seconds:.2f}"]]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _html_table(one: PassTimes) -> str:
    """Milliseconds of one pass by server and part."""
    numbers = [*(f"{_swatch(part)}{part}" for part in PARTS), "total"]
    rows, mark = "", _swatch("client")
    for name, blocks, *parts in _rows(one):
        cells = "".join(number_cell(part or "") for part in parts)
        rows += f"<tr><td>{mark}{escape(name or '')}</td><td>{blocks or ''}</td>{cells}</tr>"
        mark = ""  # the notebook's alone, which comes first
    return table(["ms per pass", "blocks"], numbers, [], rows)


def _plot(passes: Sequence[PassTimes]) -> str:
    """A bar per pass (or per few), its parts stacked; empty without passes."""
    bars = _bars(passes)
    if not bars:
        return ""
    heights = sorted(sum(bar.values()) for bar in bars)
    top = min(heights[-1], SPIKE * heights[int(0.95 * (len(heights) - 1))]) or 1.0
    step = (WIDTH - LEFT) / len(bars)
    drawn = []
    for number, bar in enumerate(bars):
        low = 0.0
        for part, colour in TIMES.items():
            high = min(low + bar[part], top)
            height = HEIGHT * (high - low) / top
            if height > 0.05:
                drawn.append(
                    f'<rect x="{LEFT + number * step:.1f}" y="{HEIGHT * (1 - high / top):.1f}" '
                    f'width="{max(step - 0.6, 0.6):.1f}" height="{height:.1f}" fill="{colour}"/>'
                )
            low = high
    ticks = [tick for tick in nice_ticks(0.0, 1000 * top, 4) if tick <= 1000 * top]
    # "1000 ms" is too wide for its place in a narrow cell.
    scale, unit = (1000, "s") if ticks[-1] >= 1000 else (1, "ms")
    axis = "".join(
        f'<text x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end" font-size="12" '
        f'fill="currentColor" opacity=".8">{tick / scale:g}'
        f"{f' {unit}' if tick == ticks[-1] else ''}</text>"
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
        'opacity=".15"/>'
        for tick in ticks
        for y in [HEIGHT * (1 - tick / (1000 * top))]
    )
    return (
        f'<svg class="sn-picture" viewBox="0 -14 {WIDTH} {HEIGHT + 22}" width="100%" '
        f'style="max-width:{WIDTH}px" '
        f'role="img" aria-label="milliseconds of each pass by part">{axis}{"".join(drawn)}</svg>'
    )


def _waterfall(one: PassTimes) -> str:
    """One pass from left to right: the notebook, then a row per server, its parts in a row."""
    whole = one.seconds or 1.0
    rows = [("notebook", [("client", one.client)])]
    rows += [(hop.name, [(part, getattr(hop, part)) for part in PARTS]) for hop in one.servers]
    drawn, began = [], 0.0
    for number, (name, parts) in enumerate(rows):
        y = ROW * number
        drawn.append(
            f'<text x="{NAMES - 6}" y="{y + ROW / 2:.0f}" text-anchor="end" font-size="12" '
            'dominant-baseline="central" '
            f'fill="currentColor" opacity=".8">{escape(name[:NAME_LETTERS])}</text>'
        )
        for part, seconds in parts:
            left, width = (WIDTH - NAMES) * began / whole, (WIDTH - NAMES) * seconds / whole
            began += seconds
            if width > 0.05:
                drawn.append(
                    f'<rect x="{NAMES + left:.1f}" y="{y + 3}" width="{max(width, 0.6):.1f}" '
                    f'height="{ROW - 6}" fill="{TIMES[part]}">'
                    f"<title>{escape(name)}: {part} {_ms(seconds)}</title></rect>"
                )
    return (
        f'<svg class="sn-picture" viewBox="0 0 {WIDTH} {ROW * len(rows)}" width="100%" '
        f'style="max-width:{WIDTH}px;margin:6px 0" role="img" '
        f'aria-label="the way of one pass, {_ms(one.seconds)} from left to right">'
        f"{''.join(drawn)}</svg>"
    )


def _bars(passes: Sequence[PassTimes]) -> list[dict[str, float]]:
    """Seconds by part, of neighbouring passes together if there are many."""
    size = -(-len(passes) // MAX_BARS)
    bars = []
    for start in range(0, len(passes), max(size, 1)):
        group = passes[start : start + size]
        bar = {part: sum(one.part(part) for one in group) / len(group) for part in PARTS}
        bars.append({**bar, "client": sum(one.client for one in group) / len(group)})
    return bars


def _swatch(part: str) -> str:
    return (
        '<span style="display:inline-block;width:8px;height:8px;border-radius:2px;'
        f'margin-right:.4em;background:{TIMES[part]}"></span>'
    )
