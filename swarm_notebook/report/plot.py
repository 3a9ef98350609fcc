"""Pictures of the package: line charts as one piece of SVG, without a script or a library.

Plain SVG rather than a plotting library: it is there in a saved notebook, on GitHub, in nbconvert
and in marimo without loading anything, it takes the colours of the theme around it, and what is
drawn here (a few hundred points with axes) is little code. What needs more has ``to_pandas()``,
which every plotting library takes.

    plot = LineChart("accuracy by block", "block", [Line("accuracy", xs, ys, spread)], levels=[...])
    plot                       # in a notebook
    plot.save("accuracy.svg")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from swarm_notebook.report.palette import SERIES

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 8, 40
# Above the picture: for letters that a narrow cell makes larger; for names of several lines.
_ABOVE, _LEGEND = 8, 26

_STYLE = """<style>
.sn-figure { font: 13px/1.5 var(--jp-ui-font-family, system-ui, sans-serif); max-width: 48em;
  color: var(--jp-ui-font-color1, inherit); }
.sn-figure .snp-title { font-weight: 600; font-size: 14px; }
.sn-figure svg { display: block; width: 100%; height: auto; }
</style>"""
_HALO = "paint-order: stroke; stroke: var(--jp-layout-color0, Canvas); stroke-width: 4px"
# A narrow cell shrinks a picture of the usual width, and its letters with it.
LETTERS = """<style>
@media (max-width: 720px) { .sn-picture text { font-size: 20px; } }
</style>"""


@dataclass(frozen=True)
class Line:
    """Values over places; ``spread`` above and below each is drawn as a bar."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    spread: Sequence[float] = ()


@dataclass(frozen=True)
class LineChart:
    """Lines over a common axis.

    Attributes:
        title: what it shows.
        x: the name of the axis.
        lines: what is drawn.
        levels: dashed lines across, as ``(name, value)``.
        within: what values can be at all; neither a spread nor the axis goes beyond.
    """

    title: str
    x: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]] = ()
    within: tuple[float, float] = (-math.inf, math.inf)

    def __repr__(self) -> str:
        return f"<LineChart: {self.title}>"

    def _repr_html_(self) -> str:
        return (
            f'{_STYLE}{LETTERS}<div class="sn-figure">'
            f'<div class="snp-title">{escape(self.title)}</div>'
            f"{self.svg()}</div>"
        )

    def save(self, path: str | Path) -> Path:
        """Write the picture as SVG."""
        path = Path(path)
        path.write_text(self.svg(), encoding="utf-8")
        return path

    def svg(self) -> str:
        """The picture alone."""
        xs = [x for line in self.lines for x in line.xs]
        highs = [*_edges(self.lines, 1), *(value for _, value in self.levels)]
        lows = [*_edges(self.lines, -1), *(value for _, value in self.levels)]
        lowest, highest = self.within
        left, right = min(xs, default=0.0), max(xs, default=1.0)
        ends = max(min(lows, default=0.0), lowest), min(max(highs, default=1.0), highest)
        ticks = nice_ticks(*ends, 5)
        low, high = ticks[0], ticks[-1]

        def place(x: float, y: float) -> tuple[float, float]:
            across = (x - left) / ((right - left) or 1)
            up = (min(max(y, lowest), highest) - low) / ((high - low) or 1)
            return (
                _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
                _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
            )

        parts = [_tick_y(place(left, value)[1], _short(value)) for value in ticks]
        whole = [x for x in nice_ticks(left, right, 8) if left <= x <= right]
        parts += [_tick_x(place(x, low)[0], _short(x)) for x in whole]
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(_text(middle, _HEIGHT - 4, self.x, "middle"))
        for _, value in self.levels:
            y = place(left, value)[1]
            parts.append(
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
                'stroke="currentColor" stroke-dasharray="5 4" opacity=".7"/>'
            )
        for number, line in enumerate(self.lines):
            parts.append(_line(line, place, SERIES[number % len(SERIES)]))
        for name, value in self.levels:
            # Over the lines, which would run through its letters.
            y = place(left, value)[1] - 4
            parts.append(f'<g style="{_HALO}">{_text(_WIDTH - _RIGHT, y, name, "end")}</g>')
        above = _ABOVE
        if len(self.lines) > 1:
            above = _LEGEND
            parts += _legend([line.name for line in self.lines])
        said = "; ".join(
            f"{line.name} from {_short(min(line.ys))} to {_short(max(line.ys))}"
            for line in self.lines
            if line.ys
        )
        return (
            f'<svg class="sn-picture" xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 {-above} {_WIDTH} {_HEIGHT + above}" '
            'font-family="system-ui, sans-serif" role="img" '
            f'aria-label="{escape(f"{self.title}: {said}")}">{"".join(parts)}</svg>'
        )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values that enclose ``low`` to ``high``, about ``count`` of them."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / max(count - 1, 1)
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


def _edges(lines: Sequence[Line], sign: int) -> list[float]:
    return [
        y + sign * (line.spread[index] if line.spread else 0.0)
        for line in lines
        for index, y in enumerate(line.ys)
    ]


def _line(line: Line, place: Callable[[float, float], tuple[float, float]], colour: str) -> str:
    points = [place(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
    way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for index, (x, y) in enumerate(points):
        value = line.ys[index]
        hint = f"{_short(line.xs[index])}: {_short(value)}"
        if line.spread:
            top = place(line.xs[index], value + line.spread[index])[1]
            end = place(line.xs[index], value - line.spread[index])[1]
            drawn += (
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{end:.1f}" '
                f'stroke="{colour}" opacity=".45" stroke-width="2"/>'
            )
            hint += f" ± {_short(line.spread[index])}"
        drawn += (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
            f"<title>{escape(hint)}</title></circle>"
        )
    return drawn


def _legend(names: Sequence[str]) -> list[str]:
    """The names of lines beside their colours, in a row."""
    room = (_WIDTH - _LEFT - _RIGHT) / len(names)
    parts = []
    for number, name in enumerate(names):
        x, colour = _LEFT + number * room, SERIES[number % len(SERIES)]
        parts.append(
            f'<line x1="{x:.1f}" x2="{x + 20:.1f}" y1="-14" y2="-14" stroke="{colour}" '
            'stroke-width="3"/>'
        )
        parts.append(_text(x + 28, -10, name, "start"))
    return parts


def _tick_y(y: float, text: str) -> str:
    return _text(_LEFT - 8, y + 4, text, "end") + (
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
        'stroke="currentColor" opacity=".15"/>'
    )


def _tick_x(x: float, text: str) -> str:
    y = _HEIGHT - _BOTTOM
    return _text(x, y + 17, text, "middle") + (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 4}" stroke="currentColor" '
        'opacity=".5"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" '
        f'fill="currentColor" opacity=".8">{escape(text)}</text>'
    )


def _short(value: float) -> str:
    """Up to three digits, without noise of floating point."""
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"
