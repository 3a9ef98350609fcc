"""A table of blocks by positions, as text and as HTML with colours that follow the theme.

The first row is the last block, as papers draw it: the text enters below and leaves on top. A
cell's colour says how strong it is, from 0 (none) to 1; values beyond are cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from swarm_notebook.report.formatting import text_table

_STYLE = """<style>
.sn-grid { overflow-x: auto; color: var(--jp-ui-font-color1, inherit); }
.sn-grid table { border-collapse: collapse; font: 12px var(--jp-code-font-family, monospace); }
.sn-grid th, .sn-grid td {
  padding: 2px 7px; text-align: center; white-space: pre; border: 0; color: inherit;
  background: none; max-width: 12em; overflow: hidden; text-overflow: ellipsis;
}
.sn-grid th { color: var(--jp-ui-font-color2, inherit); font-weight: 500; }
.sn-grid td {
  background: color-mix(
    in srgb, var(--jp-brand-color1, #2196f3) calc(var(--sn-strength) * 70%), transparent);
}
</style>"""


@dataclass(frozen=True)
class Cell:
    """What a cell shows, how strong it is, and what it says when pointed at."""

    text: str
    strength: float
    hint: str = ""


def as_html(title: str, head: Sequence[str], rows: Mapping[int, Sequence[Cell]]) -> str:
    """The grid as one fragment; all text is escaped."""
    heads = "".join(f"<th>{escape(visible(word))}</th>" for word in head)
    lines = "".join(
        f"<tr><th>{block}</th>{''.join(_cell(cell) for cell in rows[block])}</tr>"
        for block in sorted(rows, reverse=True)
    )
    return (
        f'{_STYLE}<div class="sn-grid"><div>{escape(title)}</div>'
        f"<table><thead><tr><th>block</th>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def as_text(title: str, head: Sequence[str], rows: Mapping[int, Sequence[str]]) -> str:
    """The grid with aligned columns."""
    lines = [
        [str(block), *(visible(text) for text in rows[block])]
        for block in sorted(rows, reverse=True)
    ]
    return "\n".join([title, *text_table(["block", *(visible(word) for word in head)], lines)])


def visible(word: str) -> str:
    """A token's text with its white space to be seen: a leading space is part of most words."""
    return word.replace(" ", "·").replace("\n", "↵").replace("\t", "→") or "∅"


def _cell(cell: Cell) -> str:
    strength = min(max(cell.strength, 0.0), 1.0)
    hint = f' title="{escape(cell.hint)}"' if cell.hint else ""
    return f'<td style="--sn-strength: {strength:.2f}"{hint}>{escape(visible(cell.text))}</td>'
