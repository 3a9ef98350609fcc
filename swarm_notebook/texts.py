"""Names of peers, and texts of theirs made fit to be shown."""

from __future__ import annotations

import unicodedata

# Stands in the place of a peer's name where that is this notebook.
HERE = "this notebook"

# Control characters (Cc), what has no width or turns the direction of a text (Cf), separators of
# lines and paragraphs, halves of characters: a terminal may obey them, and a reader see other
# things than are there.
_UNFIT = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs"})


def clean(text: str) -> str:
    """A peer's text, with a space for each character that is not to be seen."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(" " if unicodedata.category(char) in _UNFIT else char for char in text)
