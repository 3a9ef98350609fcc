"""HTML for `status`: tables and a strip of blocks that follow the notebook's theme.

Colours come from JupyterLab's ``--jp-*`` variables; elsewhere they derive from the text colour
around them, so that no theme has to be detected. Everything is one static fragment: no scripts,
and no styles outside ``.sn-view``. Whatever a server said is escaped.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from swarm_notebook.report.formatting import UNKNOWN, milliseconds, number

if TYPE_CHECKING:
    from swarm_notebook.report.status import RouteTable, ServerRow, SwarmStatus

STYLE = """<style>
.sn-view {
  --sn-text: var(--jp-ui-font-color1, inherit);
  --sn-dim: var(--jp-ui-font-color2, color-mix(in srgb, currentColor 65%, transparent));
  --sn-line: var(--jp-border-color2, color-mix(in srgb, currentColor 22%, transparent));
  --sn-track: var(--jp-layout-color2, color-mix(in srgb, currentColor 8%, transparent));
  --sn-good: var(--jp-success-color1, #388e3c);
  --sn-bad: var(--jp-error-color1, #d32f2f);
  --sn-warn: var(--jp-warn-color1, #f57c00);
  --sn-blue: var(--jp-brand-color1, #2196f3);
  color: var(--sn-text); font: 13px/1.5 var(--jp-ui-font-family, system-ui, sans-serif);
  max-width: 60em; padding: 2px 0; overflow-x: auto;
}
.sn-view .sn-head { display: flex; gap: .8em; align-items: baseline; flex-wrap: wrap; }
.sn-view .sn-model { font-weight: 600; font-size: 14px; }
.sn-view .sn-dim { color: var(--sn-dim); }
.sn-view .sn-alarm {
  color: #fff; background: var(--sn-bad); border-radius: 3px; padding: 1px 8px; font-weight: 600;
}
.sn-view .sn-strip {
  display: flex; gap: 2px; height: 18px; margin: 6px 0 8px; font-size: 11px; line-height: 18px;
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
  text-align: left; padding: 3px 14px 3px 0; border: 0; border-bottom: 1px solid var(--sn-line);
  background: none; color: var(--sn-text); white-space: nowrap; vertical-align: middle;
}
.sn-view .sn-table th { color: var(--sn-dim); font-weight: 500; }
.sn-view .sn-table tbody tr:nth-child(n) { background: none; }
.sn-view .sn-table td.sn-num, .sn-view .sn-table th.sn-num {
  text-align: right; font-variant-numeric: tabular-nums;
}
.sn-view .sn-peer { font-family: var(--jp-code-font-family, monospace); color: var(--sn-dim); }
.sn-view .sn-track {
  display: inline-block; position: relative; width: 7em; height: 8px; margin-right: .6em;
  background: var(--sn-track); border-radius: 2px;
}
.sn-view .sn-bar {
  position: absolute; top: 0; bottom: 0; min-width: 2px; border-radius: 2px;
  background: var(--sn-blue);
}
.sn-view .sn-dot { display: inline-block; width: 8px; height: 8px; border-radius: 50%;
  margin-right: .5em; background: var(--sn-dim); }
.sn-view .sn-dot.sn-online { background: var(--sn-good); }
.sn-view .sn-dot.sn-joining { background: var(--sn-warn); }
.sn-view .sn-dot.sn-avoided { background: var(--sn-bad); }
</style>"""


def status(facts: SwarmStatus) -> str:
    """The model's headline, its blocks, its servers."""
    kind = "sn-alarm" if facts.missing else "sn-dim"
    head = _head(facts.title, f'<span class="{kind}">{escape(facts.headline)}</span>')
    titles = ["server", "peer", "blocks", "state"]
    numbers = ["round trip", "tokens/s", "cache left"]
    rows = "".join(_server(row, facts.num_blocks) for row in facts.servers)
    table = _table(titles, numbers, ["dtype", "version"], rows)
    return _view(head + _strip(facts) + table)


def route(facts: RouteTable) -> str:
    """The hops in order, each with its share of the blocks."""
    head = _head(
        facts.title, f'<span class="sn-dim">{facts.expected_ms:.1f} ms per token expected</span>'
    )
    last = max((hop.end for hop in facts.hops), default=1)
    rows = "".join(
        f"<tr><td>{_bar(hop.start, hop.end, last)}{hop.blocks}</td><td>{escape(hop.name)}</td>"
        f"{_peer(hop.peer_id)}{_number(f'{hop.expected_ms:.1f}')}</tr>"
        for hop in facts.hops
    )
    return _view(head + _table(["blocks", "server", "peer"], ["ms/token"], [], rows))


def _view(body: str) -> str:
    return f'{STYLE}<div class="sn-view">{body}</div>'


def _head(model: str, rest: str) -> str:
    return f'<div class="sn-head"><span class="sn-model">{escape(model)}</span>{rest}</div>'


def _table(titles: list[str], numbers: list[str], more: list[str], rows: str) -> str:
    cells = "".join(f"<th>{title}</th>" for title in titles)
    cells += "".join(f'<th class="sn-num">{title}</th>' for title in numbers)
    cells += "".join(f"<th>{title}</th>" for title in more)
    return f'<table class="sn-table"><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>'


def _strip(facts: SwarmStatus) -> str:
    """Neighbouring blocks with as many servers as one bar; red where there is none."""
    bars = []
    for start, end, count in facts.coverage:
        label = "none" if count == 0 else f"&times;{count}"
        title = f"blocks {start}:{end}: {count} server{'' if count == 1 else 's'}"
        bars.append(
            f'<div class="sn-run sn-{min(count, 2)}" style="flex:{end - start}" '
            f'title="{title}">{start}:{end} {label}</div>'
        )
    return f'<div class="sn-strip">{"".join(bars)}</div>'


def _server(row: ServerRow, num_blocks: int) -> str:
    dot = f'<span class="sn-dot sn-{escape(row.state)}"></span>'
    note = f' <span class="sn-dim">({escape(row.note)})</span>' if row.note else ""
    return (
        f"<tr><td>{escape(row.name)}</td>{_peer(row.peer_id)}"
        f"<td>{_bar(row.start, row.end, num_blocks)}{row.blocks}</td>"
        f"<td>{dot}{escape(row.state)}{note}</td>"
        f"{_number(milliseconds(row.rtt))}{_number(number(row.throughput))}"
        f"{_number(number(row.cache_left))}"
        f"<td>{escape(row.precision or UNKNOWN)}</td><td>{escape(row.version or UNKNOWN)}</td></tr>"
    )


def _bar(start: int, end: int, total: int) -> str:
    left, width = 100 * start / total, 100 * (end - start) / total
    return (
        '<span class="sn-track"><span class="sn-bar" '
        f'style="left:{left:.1f}%;width:{width:.1f}%"></span></span>'
    )


def _peer(peer_id: str) -> str:
    """The end of a peer id, which tells peers apart; the whole of it on hover."""
    return f'<td class="sn-peer" title="{escape(peer_id)}">…{escape(peer_id[-6:])}</td>'


def _number(text: str) -> str:
    return f'<td class="sn-num">{escape(text)}</td>'
