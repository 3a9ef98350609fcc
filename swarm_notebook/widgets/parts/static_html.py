"""Static HTML of the widgets that write: for saved notebooks, GitHub and nbconvert. No scripts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """<style>
.snw { color: var(--jp-ui-font-color1, inherit); max-width: 60em; overflow: hidden;
  font: 13px/1.6 var(--jp-ui-font-family, system-ui, sans-serif); }
.snw-title { font-weight: 600; font-size: 14px; }
.snw-dim { color: var(--jp-ui-font-color2, color-mix(in srgb, currentColor 65%, transparent));
  font-size: 12px; }
.snw-prompt, .snw-text, .snw-turn { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0;
  unicode-bidi: isolate; }
.snw-prompt { font-style: italic; }
.snw-text span { border-radius: 2px; background: color-mix(
  in srgb, var(--jp-warn-color1, #f57c00) calc(var(--u) * 55%), transparent); }
.snw-turn { border-left: 3px solid color-mix(in srgb, currentColor 30%, transparent);
  padding-left: .8em; }
/* What was Markdown has lines between its paragraphs that are none of the text. */
.snw-turn:has(> p) { white-space: normal; }
.snw-turn > :is(p, pre) { margin: .3em 0; }
.snw-wrong { border-left: 3px solid var(--jp-error-color1, #d32f2f); padding-left: .8em;
  font-size: 12px; font-weight: 600; }
</style>"""


def shell(body: str) -> str:
    """The fragment around a picture's body."""
    return f'{_STYLE}<div class="snw">{body}</div>'


def warning(text: str) -> str:
    """A sentence that must not be overlooked; nothing for none."""
    return f'<div class="snw-wrong">{escape(text)}</div>' if text else ""


def facts(note: str, stats: Mapping[str, Any]) -> str:
    """One line on the last run."""
    parts = [note] if note else []
    if stats.get("tokens"):
        parts.append(f"{stats['tokens']} tokens")
    if stats.get("first") is not None:
        parts.append(f"first after {stats['first']:.2f} s")
    if stats.get("rate") is not None:
        parts.append(f"then {stats['rate']:.1f} tokens/s")
    return ", ".join(parts)
