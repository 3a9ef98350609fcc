"""What a user typed after ``%swarm``, before anybody else reads something into it.

IPython takes a line that ends with ``?`` for a question about the word before it, and a shell's
rules of quoting take the apostrophe of *what's* for the beginning of a quotation. Here a text is a
text: `keep_lines`, an input transformer, makes ``%swarm …`` a call before IPython looks at its
end, and `split` knows quotes only around whole words.
"""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator

_LINE = re.compile(r"(?P<before>\s*(?:[^\W\d][\w.]*\s*=\s*)?)%swarm(?P<rest>[ \t].*|)$")
# A quoted word, which an option may begin, or anything without white space.
_WORD = re.compile(
    r"""(?P<option>--[\w-]+=)?(?:"(?P<double>(?:[^"\\]|\\.)*)"|'(?P<single>[^']*)')(?=\s|$)|\S+""",
    re.DOTALL,
)


class Word(str):
    """A word without the quotes around it, and where it stood in the line."""

    __slots__ = ("end", "start")

    start: int
    end: int


def split(line: str) -> list[Word]:
    """The words of a line; ``"…"`` and ``'…'`` are one, and any other quote is a letter.

    Within double quotes a backslash takes the meaning from a quote or backslash after it.
    """
    words = []
    for match in _WORD.finditer(line):
        double, single = match["double"], match["single"]
        quoted = re.sub(r'\\(["\\])', r"\1", double) if double is not None else single
        word = Word(match[0] if quoted is None else (match["option"] or "") + quoted)
        word.start, word.end = match.span()
        words.append(word)
    return words


def text_of(words: list[Word], line: str) -> str:
    """The text that these words of a line are: one word as it is, several as they were typed."""
    if len(words) < 2:
        return "".join(words)
    return line[words[0].start : words[-1].end]


def keep_lines(lines: list[str]) -> list[str]:
    """An IPython input transformer: ``%swarm`` lines become calls, with their text as it is.

    ``%swarm?`` stays IPython's question. Whatever stands within a string, brackets or a cell magic
    is left alone. A backslash at the end of a line goes on with the next one, as in all magics.
    """
    if lines and lines[0].lstrip().startswith("%%"):
        return lines
    kept: list[str] = []
    rest = iter(lines)
    for line in rest:
        match = _LINE.match(line.rstrip("\n"))
        if match is None or not _begins_statement(kept):
            kept.append(line)
            continue
        text = match["rest"].strip()
        while text.endswith("\\"):
            text = f"{text[:-1].rstrip()} {next(rest, '').strip()}"
        kept.append(f"{match['before']}get_ipython().run_line_magic('swarm', {text!r})\n")
    return kept


def _begins_statement(before: list[str]) -> bool:
    """Whether these lines leave no string or bracket open."""
    if not before:
        return True
    rest: Iterator[str] = iter(before)
    try:
        for _ in tokenize.generate_tokens(lambda: next(rest, "")):
            pass
    except tokenize.TokenError as error:
        # Python 3.11 says "EOF in multi-line string" or "statement", 3.12 "unterminated
        # triple-quoted string literal"; what else is wrong is none of our business.
        said = str(error.args[0])
        return not ("EOF in multi-line" in said or "triple-quoted" in said)
    except SyntaxError:
        return True
    return True
