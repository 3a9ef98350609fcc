"""What the HTML of all reports is made of: one style, the frame, tables and their cells.

Colours of text and lines come from JupyterLab's ``--jp-*`` variables; elsewhere they derive from
the text colour around them, so that no theme has to be detected. Everything is one static fragment:
no scripts, and no styles outside ``.sn-view``. Whatever a server said is escaped by whoever puts it
in.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """<style>
.sn-view {
  --sn-text: var(--jp-ui-font-color1, inherit);
  --sn-dim: var(--jp-ui-font-color2, color-mix(in srgb, currentColor 65%, transparent));
  --sn-line: var(--jp-border-color2, color-mix(in srgb, currentColor 22%, transparent));
  --sn-track: var(--jp-layout-color2, color-mix(in srgb, currentColor 8%, transparent));
  --sn-good: #2e7d32; /* below white letters: JupyterLab's have too little contrast */
  --sn-bad: #c62828;
  --sn-warn: var(--jp-warn-color1, #f57c00);
  --sn-blue: #1976d2;
  color: var(--sn-text); font: 13px/1.5 var(--jp-ui-font-family, system-ui, sans-serif);
  max-width: 60em; padding: 2px 0; overflow-x: auto;
}
.sn-view .sn-head { display: flex; gap: .8em; align-items: baseline; flex-wrap: wrap; }
.sn-view .sn-model { font-weight: 600; font-size: 14px; }
.sn-view .sn-dim { color: var(--sn-dim); }
.sn-view .sn-alarm {
  color: #fff; background: var(--sn-bad); border-radius: 3px; padding: 2px 8px; font-weight: 600;
}
.sn-view .sn-strip {
  display: flex; gap: 2px; height: 18px; margin: 8px 0 8px; font-size: 12px; line-height: 18px;
}
.sn-view .sn-run {
  min-width: 3px; text-align: center; color: #fff; overflow: hidden; white-space: nowrap;
  border-radius: 2px;
}
.sn-view .sn-run.sn-0 { background: var(--sn-bad); font-weight: 600; }
.sn-view .sn-run.sn-1 { background: var(--sn-blue); }
.sn-view .sn-run.sn-2 { background: var(--sn-good); }
.sn-view .sn-table { border-collapse: collapse; margin: 0; font-size: 12px; width: auto; }
.sn-view .sn-table th, .sn-view .sn-table td {
  text-align: left; padding: 4px 12px 4px 0; border: 0; border-bottom: 1px solid var(--sn-line);
  background: none; color: var(--sn-text); white-space: nowrap; vertical-align: middle;
}
.sn-view .sn-table th { color: var(--sn-dim); font-weight: 500; }
.sn-view .sn-table tbody tr:nth-child(n) { background: none; }
.sn-view .sn-table td.sn-num, .sn-view .sn-table th.sn-num {
  text-align: right; font-variant-numeric: tabular-nums;
}
.sn-view .sn-table + .sn-table { margin-top: 8px; }
.sn-view .sn-long { max-height: 30em; overflow: auto; }
.sn-view .sn-peer { font-family: var(--jp-code-font-family, monospace); color: var(--sn-dim); }
.sn-view .sn-track {
  display: inline-block; position: relative; width: 7em; height: 8px; margin-right: .6em;
  background: var(--sn-track); border-radius: 2px;
}
.sn-view .sn-bar {
  position: absolute; top: 0; bottom: 0; min-width: 2px; border-radius: 2px;
  background: var(--sn-blue);
}
.sn-view .sn-note, .sn-view .sn-table td.sn-note {
  min-width: 12em; max-width: 26em; white-space: normal; overflow-wrap: anywhere;
}
.sn-view .sn-table td.sn-fact { min-width: 16em; white-space: normal; }
.sn-view .sn-dot { display: inline-block; width: 8px; height: 8px; border-radius: 50%;
  margin-right: .5em; background: var(--sn-dim); }
.sn-view .sn-dot.sn-online { background: var(--sn-good); }
.sn-view .sn-dot.sn-joining { background: var(--sn-warn); }
.sn-view .sn-dot.sn-bad { background: var(--sn-bad); }
</style>"""


def view(body: str) -> str:
    """The whole fragment around a report's body, which the keyboard can scroll where it is wide."""
    return f'{STYLE}<div class="sn-view" tabindex="0">{body}</div>'


def head(model: str, headline: str, *, alarm: bool = False) -> str:
    """The first line: the model and one sentence, red if it is an ``alarm``."""
    kind = "sn-alarm" if alarm else "sn-dim"
    return (
        f'<div class="sn-head"><span class="sn-model">{escape(model)}</span>'
        f'<span class="{kind}">{escape(headline)}</span></div>'
    )


def table(titles: list[str], numbers: list[str], more: list[str], rows: str) -> str:
    """A table of rows in HTML; columns of ``numbers`` are aligned at the right."""
    cells = "".join(f"<th>{title}</th>" for title in titles)
    cells += "".join(f'<th class="sn-num">{title}</th>' for title in numbers)
    cells += "".join(f"<th>{title}</th>" for title in more)
    return f'<table class="sn-table"><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>'


def facts(found: Iterable[tuple[str, str]]) -> str:
    """A table of names and what there is to say of each."""
    rows = "".join(
        f'<tr><td class="sn-dim">{escape(name)}</td><td class="sn-fact">{escape(text)}</td></tr>'
        for name, text in found
    )
    return f'<table class="sn-table"><tbody>{rows}</tbody></table>'


def block_bar(start: int, end: int, total: int) -> str:
    """Blocks ``[start, end)`` on a track of ``total`` blocks."""
    left, width = 100 * start / total, 100 * (end - start) / total
    return (
        '<span class="sn-track"><span class="sn-bar" '
        f'style="left:{left:.1f}%;width:{width:.1f}%"></span></span>'
    )


def peer_cell(peer_id: str) -> str:
    """The end of a peer id, which tells peers apart; the whole of it on hover."""
    return f'<td class="sn-peer" title="{escape(peer_id)}">…{escape(peer_id[-6:])}</td>'


def number_cell(text: str) -> str:
    """A cell aligned at the right."""
    return f'<td class="sn-num">{escape(text)}</td>'
