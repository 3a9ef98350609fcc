"""Whatever a model writes, a page can hold it: no script, no style, no request to anywhere."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import pytest

from swarm_notebook.widgets.parts.markdown import MOST_LETTERS, plain, render

HARMLESS_TAGS = {
    *("a", "blockquote", "br", "code", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol"),
    *("p", "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"),
}


class Found(HTMLParser):
    """The tags and attributes of a fragment."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "![tracker](https://evil.example/pixel.png)",
        "[click](javascript:alert(1)) [b](data:text/html;base64,PHN2Zz4=) <javascript:alert(1)>",
        "[x](vbscript:a) [y](  java\tscript:alert(1)) [z](JaVaScRiPt:alert(1))",
        '[a](https://x.example "onmouseover=alert(1)")',
        "```html\n</code></pre><script>alert(1)</script>\n```",
        '```"><script>alert(1)</script>\nx\n```',
        "```python\n'</span><script>alert(1)</script>'\n```",
        "<style>*{display:none}</style><iframe src=//evil.example></iframe>",
        "| a |\n|---|\n| <svg onload=alert(1)> |",
        "`<b>` **<math><mtext></mtext><mglyph><style><img src onerror=alert(1)>**",
        "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x&#62;",
        '<a href="https://x.example" style="position:fixed;inset:0">x</a>',
    ],
)
def test_hostile_text_does_nothing(text: str) -> None:
    found = Found(render(text))
    assert found.tags <= HARMLESS_TAGS
    for name, value in found.attributes:
        assert name in {"href", "title", "class", "rel", "target", "start"}
        if name == "href":
            assert re.match("https?://|mailto:", value)
        if name == "class":
            assert value.startswith("sn-c-")


def test_what_is_shown() -> None:
    html = render(
        "# Title\n\nSome **bold** text, `code`\n\n1. one\n2. two\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    )
    for part in ("<h1>Title</h1>", "<strong>bold</strong>", "<code>code</code>", "<li>one</li>"):
        assert part in html
    assert "<td>2</td>" in html
    link = render("[a](https://x.example/)")
    assert 'rel="noopener noreferrer nofollow"' in link
    assert 'target="_blank"' in link
    assert "&lt;script&gt;" in render("<script>")
    assert "&lt;script&gt;" in plain("<script>")


def test_code_is_coloured_where_its_language_is_known() -> None:
    assert '<span class="sn-c-k">def</span>' in render("```python\ndef f(): pass\n```")
    assert "span" not in render("```brainfuck\n+++\n```")
    assert "<pre><code>x = 1" in render("```\nx = 1")  # still being written


def test_marks_that_turn_the_text_are_shown() -> None:
    assert "[U+202E]" in render("a\u202eb")
    assert "[U+2066]" in plain("a\u2066b")
    assert "\u200f" in render("a\u200fb")  # harmless, and needed in Arabic and Hebrew
    assert "👩‍👩‍👧‍👦" in render("👩‍👩‍👧‍👦")


@pytest.mark.parametrize(
    "unit", ["[", "*a ", "`", "> ", "[a](", "![", "- ", "_a_", "<", "&", "|", "x", "\\", "~~a"]
)
def test_long_and_odd_texts_take_no_long_time(unit: str) -> None:
    """A wide margin: prose of this length takes a twentieth of a second."""
    text = unit * (20_000 // len(unit))
    began = time.thread_time()
    Found(render(text))
    assert time.thread_time() - began < 10


def test_a_text_too_long_for_markdown_is_shown_as_it_is() -> None:
    assert render("*" * (MOST_LETTERS + 1)).startswith("<pre>***")
