"""Markdown of a model as HTML that can do nothing.

What a model writes is hostile text: it may come from a server that lies, or repeat what somebody
put into the prompt. HTML in it is shown, not obeyed; there are no images, which would tell somebody
that they were looked at; links go to the web only. What markdown-it makes of the text then passes
nh3, which knows a short list of tags.
"""

from __future__ import annotations

import functools
import re
from html import escape
from typing import Any

# Longer texts than this are shown as they are: they are no prose, and parsing takes its time.
MOST_LETTERS = 200_000
_MOST_COLOURED = 20_000

# Marks that turn the direction of all that follows, and control characters.
_HARMFUL = re.compile("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f]")

# Some lexers take forever on the wrong text; these are known and common.
_LEXERS = {
    "bash", "c", "c++", "cpp", "css", "go", "html", "java", "javascript", "js", "json", "py",
    "python", "rust", "sh", "shell", "sql", "toml", "ts", "typescript", "xml", "yaml",
}  # fmt: skip

_TAGS = {
    "a", "blockquote", "br", "code", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol",
    "p", "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
_ATTRIBUTES = {"a": {"href", "title"}, "ol": {"start"}, "span": {"class"}}


def harmless(text: str) -> str:
    """The text with characters that could confuse a reader made visible."""
    return _HARMFUL.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def plain(text: str) -> str:
    """The text as it stands, as HTML."""
    return escape(harmless(text))


def render(text: str) -> str:
    """Markdown as HTML."""
    if len(text) > MOST_LETTERS:
        return f"<pre>{plain(text)}</pre>"
    parser, clean = _tools()
    return str(clean(parser.render(harmless(text))))


@functools.cache
def _tools() -> tuple[Any, Any]:
    import nh3
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False, "highlight": _highlight})
    parser.enable(["table", "strikethrough"]).disable("image")
    clean = functools.partial(
        nh3.clean,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )
    return parser, clean


def _highlight(code: str, language: str, _attributes: str) -> str:
    """Code in colours, by classes of Pygments; empty if it stays as it is."""
    name = language.lower()
    if name not in _LEXERS or len(code) > _MOST_COLOURED:
        return ""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name

    lexer = get_lexer_by_name(name, stripnl=False)
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix="sn-c-")))
