"""A table of cells by row and column, as text and as HTML with colours that follow the theme.

For a table of blocks the first row is the last block, as papers draw it: the text enters below and
leaves on top. A cell's colour says how strong it is, from -1 to 1, on the diverging scale of
`report/palette.py`; values beyond are cut. The legend says what the ends mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from swarm_notebook.report.formatting import text_table
from swarm_notebook.report.palette import MINUS, MOST, PLUS

# Its classes are its own: several pictures and widgets stand on one page.
_COLOURS = f".sn-heat {{ --snh-plus: {PLUS}; --snh-minus: {MINUS}; --snh-most: {MOST:.0%}; }}"
# In a cell without a value: an empty one is a value of about 0.
DASH = "–"
_STYLE = (
    f"<style>\n{_COLOURS}"
    """
.sn-heat {
  overflow-x: auto; color: var(--jp-ui-font-color1, inherit);
  font: 13px/1.5 var(--jp-ui-font-family, system-ui, sans-serif);
}
.sn-heat .snh-title { font-weight: 600; font-size: 14px; }
.sn-heat .snh-grid {
  border-collapse: separate; border-spacing: 1px; margin: 4px 0; width: auto; table-layout: auto;
  font: 12px/1.5 var(--jp-code-font-family, monospace);
}
/* More words than JupyterLab's own rule for tables has, which aligns all of it at the right. */
.sn-heat .snh-grid tr :is(th, td) {
  padding: 2px 8px; text-align: center; white-space: pre; border: 0; border-radius: 2px;
  color: inherit; background: none; max-width: 12em; overflow: hidden; text-overflow: ellipsis;
}
.sn-heat .snh-grid:has(.snh-prose) tr th { text-align: start; }
.sn-heat .snh-grid tr td.snh-prose {
  text-align: start; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 75ch;
  padding: 4px 8px; font: 13px/1.5 var(--jp-ui-font-family, system-ui, sans-serif);
}
.sn-heat .snh-grid tr th { color: var(--jp-ui-font-color2, inherit); font-weight: 500; }
/* The notebook's own stripes would shine through and be taken for values. */
.sn-heat tbody tr:nth-child(n), .sn-heat tbody tr:hover { background: none; }
.sn-heat .snh-grid tbody td {
  background: color-mix(
    in srgb, var(--snh-hue) calc(var(--snh-strength) * var(--snh-most)), transparent);
}
.sn-heat .snh-legend {
  display: flex; flex-wrap: wrap; gap: 0 8px; align-items: center; font-size: 12px;
  color: var(--jp-ui-font-color2, inherit); white-space: nowrap;
}
/* Both ends stay beside the scale; their words wrap in a narrow cell. */
.sn-heat .snh-ends { display: flex; gap: 8px; align-items: center; white-space: normal; }
.sn-heat .snh-scale { flex: none; width: 7em; height: 10px; border-radius: 2px;
  background: linear-gradient(to right, var(--snh-low), transparent var(--snh-zero),
  color-mix(in srgb, var(--snh-plus) var(--snh-most), transparent)); }
</style>"""
)


@dataclass(frozen=True)
class Cell:
    """What a cell shows, how strong it is, what it says when pointed at; prose is wrapped, and
    shown without the space at its ends.
    """

    text: str
    strength: float
    hint: str = ""
    prose: bool = False


@dataclass(frozen=True)
class Legend:
    """What the colours mean: the weakest, the strongest, and what is below 0 if there is such; and
    what cells without a value are, which show a dash.
    """

    low: str
    high: str
    below: str = ""
    absent: str = ""

    def html(self) -> str:
        """A scale between its ends."""
        minus = "color-mix(in srgb, var(--snh-minus) var(--snh-most), transparent)"
        style = (
            f"--snh-low:{minus};--snh-zero:50%"
            if self.below
            else ("--snh-low:transparent;--snh-zero:0%")
        )
        ends = (self.below, self.high) if self.below else (self.low, self.high)
        middle = f"<span>no colour: {escape(self.low)}</span>" if self.below else ""
        middle += f"<span>{DASH}: {escape(self.absent)}</span>" if self.absent else ""
        return (
            f'<div class="snh-legend"><span class="snh-ends"><span>{escape(ends[0])}</span>'
            f'<span class="snh-scale" style="{style}"></span><span>{escape(ends[1])}</span></span>'
            f"{middle}</div>"
        )


def as_html(
    title: str,
    head: Sequence[str],
    rows: Iterable[tuple[object, Sequence[Cell]]],
    *,
    corner: str = "block",
    legend: Legend | None = None,
) -> str:
    """The grid as one fragment; all text is escaped."""
    heads = "".join(f'<th scope="col">{escape(word)}</th>' for word in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th>{"".join(map(_cell, cells))}</tr>'
        for name, cells in rows
    )
    return (
        f'{_STYLE}<div class="sn-heat" tabindex="0"><div class="snh-title">{escape(title)}</div>'
        '<table class="snh-grid"><thead>'
        f'<tr><th scope="col">{escape(corner)}</th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table>{legend.html() if legend else ''}</div>"
    )


def by_block(rows: Mapping[int, Sequence[Cell]]) -> list[tuple[object, Sequence[Cell]]]:
    """Rows in the order in which blocks are drawn."""
    return [(block, rows[block]) for block in sorted(rows, reverse=True)]


def as_text(title: str, head: Sequence[str], rows: Mapping[int, Sequence[str]]) -> str:
    """The grid of blocks with aligned columns."""
    lines = [
        [str(block), *(visible(text) for text in rows[block])]
        for block in sorted(rows, reverse=True)
    ]
    return "\n".join([title, *text_table(["block", *(visible(word) for word in head)], lines)])


def visible(word: str) -> str:
    """A token's text with its white space to be seen: a leading space is part of most words."""
    shown = word.replace(" ", "·").replace("\n", "↵").replace("\t", "→") or "∅"
    # What has no shape of its own (a no-break space, a control character) by its number.
    return "".join(mark if mark.isprintable() else f"U+{ord(mark):04X}" for mark in shown)


def _cell(cell: Cell) -> str:
    strength = min(abs(cell.strength), 1.0)
    hue = "minus" if cell.strength < 0 else "plus"
    hint = f' title="{escape(cell.hint)}"' if cell.hint else ""
    style = f"--snh-strength:{strength:.2f};--snh-hue:var(--snh-{hue})"
    kind = ' class="snh-prose" dir="auto"' if cell.prose else ""
    text = cell.text.strip() if cell.prose else cell.text
    return f'<td{kind} style="{style}"{hint}>{escape(text)}</td>'
