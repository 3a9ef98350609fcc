"""Curves that stay small however long a run is, and their picture without scripts.

`Curves` keeps at most `MAX_POINTS` points: when they are full, neighbours are merged to their mean
and from then on twice as many steps make a point. So the first step is as visible as the last, and
what travels to a browser is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

MAX_POINTS = 400  # about one and a half per pixel of a curve
_WIDTH, _HEIGHT = 240, 90

_STYLE = """<style>
.sn-curves { font: 13px/1.5 var(--jp-ui-font-family, system-ui, sans-serif); }
.sn-curves div { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 4px; }
.sn-curves figure { margin: 0; }
.sn-curves svg { display: block; }
.sn-curves polyline { fill: none; stroke: var(--jp-brand-color1, #2196f3); stroke-width: 1.5; }
</style>"""


class Curves:
    """Several values per step, each known at some of the steps."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._stride = 1
        # Per point: how many steps it stands for, the last of them, sums and counts by name.
        self._points: list[tuple[int, int, dict[str, tuple[float, int]]]] = []

    def add(self, step: int, values: dict[str, float]) -> None:
        """One more step; a value that is no number leaves a gap."""
        self._names += [name for name in values if name not in self._names]
        one = {name: (value, 1) for name, value in values.items() if math.isfinite(value)}
        more = bool(self._points) and self._points[-1][1] == step  # of the step that we have
        new = (0 if more else 1, step, one)
        if self._points and (more or self._points[-1][0] < self._stride):
            self._points[-1] = _merged(self._points[-1], new)
        else:
            self._points.append(new)
        if len(self._points) > MAX_POINTS:
            self._stride *= 2
            pairs = zip(self._points[::2], [*self._points[1::2], None], strict=False)
            self._points = [_merged(a, b) if b is not None else a for a, b in pairs]

    def shown(self) -> tuple[list[str], list[list[float | None]]]:
        """The names, and ``[step, value or None per name]`` per point."""
        rows: list[list[float | None]] = []
        for _, step, sums in self._points:
            row: list[float | None] = [step]
            for name in self._names:
                total, count = sums.get(name, (0.0, 0))
                row.append(total / count if count else None)
            rows.append(row)
        return list(self._names), rows


def as_html(
    title: str, line: str, names: Sequence[str], points: Sequence[Sequence[float | None]]
) -> str:
    """All curves as one fragment."""
    figures = "".join(
        _figure(name, [(row[0], row[place + 1]) for row in points])
        for place, name in enumerate(names)
    )
    return (
        f'{_STYLE}<div class="sn-curves"><b>{escape(title)}</b> {escape(line)}'
        f"<div>{figures}</div></div>"
    )


def _figure(name: str, points: Sequence[tuple[float | None, float | None]]) -> str:
    known = [(x, y) for x, y in points if x is not None and y is not None]
    if not known:
        return ""
    left, right = known[0][0], known[-1][0]
    low, high = min(y for _, y in known), max(y for _, y in known)
    places = " ".join(
        f"{_WIDTH * (x - left) / ((right - left) or 1):.1f},"
        f"{_HEIGHT - 2 - (_HEIGHT - 4) * (y - low) / ((high - low) or 1):.1f}"
        for x, y in known
    )
    return (
        f"<figure><figcaption>{escape(name)}: {known[-1][1]:.4g} "
        f"({low:.4g} to {high:.4g}, steps {left:.0f} to {right:.0f})</figcaption>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(name)}">'
        f'<polyline points="{places}"/></svg></figure>'
    )


def _merged(
    one: tuple[int, int, dict[str, tuple[float, int]]],
    two: tuple[int, int, dict[str, tuple[float, int]]],
) -> tuple[int, int, dict[str, tuple[float, int]]]:
    sums = dict(one[2])
    for name, (total, count) in two[2].items():
        before, known = sums.get(name, (0.0, 0))
        sums[name] = (before + total, known + count)
    return one[0] + two[0], two[1], sums
