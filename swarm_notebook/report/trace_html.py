"""HTML for `trace`: a table of the mean pass and a plot of all passes, as one static SVG."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from swarm_notebook.report.status_html import STYLE
from swarm_notebook.report.trace import PARTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swarm_notebook.report.trace import PassTimes, Trace

WIDTH, HEIGHT, LEFT = 640, 120, 56
MAX_BARS = 160
SPIKE = 1.25  # how far above the 95th percentile a bar may rise before it is cut

# What is stacked, from below, with colours that are told apart on light and dark ground.
_COLOURS = {
    "compute": "#4c8bf5",
    "queue": "#e8a33d",
    "network": "#d1495b",
    "serialisation": "#8d6fd1",
    "client": "#5fa777",
}


def trace(facts: Trace) -> str:
    """The headline, the plot and the table."""
    head = (
        f'<div class="sn-head"><span class="sn-model">{escape(facts.title)}</span>'
        f'<span class="sn-dim">{escape(facts.headline)}</span></div>'
    )
    lost = "".join(f'<div class="sn-alarm">{escape(reason)}</div>' for reason in facts.failovers)
    body = plot(facts.passes[1:]) + table(facts.mean or facts.passes[0]) if facts.passes else ""
    return f'{STYLE}<div class="sn-view">{head}{lost}{body}</div>'


def table(one: PassTimes) -> str:
    """Milliseconds of one pass by server and part."""
    numbers = "".join(f'<th class="sn-num">{_swatch(part)}{part}</th>' for part in PARTS)
    titles = f'<th>ms per pass</th><th>blocks</th>{numbers}<th class="sn-num">all</th>'
    rows = [_row(f"{_swatch('client')}notebook", "", ["", "", "", ""], one.client)]
    for server in one.servers:
        parts = [_ms(getattr(server, part)) for part in PARTS]
        rows.append(_row(escape(server.name), server.blocks, parts, server.seconds))
    rows.append(_row("together", "", [_ms(one.part(part)) for part in PARTS], one.seconds))
    return (
        f'<table class="sn-table"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def plot(passes: Sequence[PassTimes]) -> str:
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
        for part, colour in _COLOURS.items():
            high = min(low + bar[part], top)
            height = HEIGHT * (high - low) / top
            if height > 0.05:
                drawn.append(
                    f'<rect x="{LEFT + number * step:.1f}" y="{HEIGHT * (1 - high / top):.1f}" '
                    f'width="{max(step - 0.6, 0.6):.1f}" height="{height:.1f}" fill="{colour}"/>'
                )
            low = high
    axis = "".join(
        f'<text x="{LEFT - 6}" y="{HEIGHT * (1 - share) + 4:.0f}" text-anchor="end" '
        f'font-size="11" fill="currentColor" opacity=".65">{1000 * top * share:.3g}{unit}</text>'
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{HEIGHT * (1 - share):.1f}" '
        f'y2="{HEIGHT * (1 - share):.1f}" stroke="currentColor" opacity=".15"/>'
        for share, unit in ((0.0, ""), (0.5, ""), (1.0, " ms"))
    )
    return (
        f'<svg viewBox="0 -8 {WIDTH} {HEIGHT + 16}" width="100%" style="max-width:{WIDTH}px" '
        f'role="img" aria-label="milliseconds of each pass by part">{axis}{"".join(drawn)}</svg>'
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


def _row(name: str, blocks: str, parts: Sequence[str], seconds: float) -> str:
    cells = "".join(f'<td class="sn-num">{cell}</td>' for cell in (*parts, _ms(seconds)))
    return f"<tr><td>{name}</td><td>{blocks}</td>{cells}</tr>"


def _swatch(part: str) -> str:
    return (
        '<span style="display:inline-block;width:8px;height:8px;border-radius:2px;'
        f'margin-right:.4em;background:{_COLOURS[part]}"></span>'
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"
