"""A growing text as the cells that a view colours, one per token. Pure.

A cell is a list, ``[text, probability, special, [[id, text, probability], …]]``; `js/src/tokens.js`
reads it. Cells never change, so a view is sent the new ones only: whenever there are `PAGE` of
them they become a page, which is sent once; the rest, the `tail`, is sent with every update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swarm_notebook.writing import Pieces, Token, Vocabulary

PAGE = 64

Cell = list[Any]


class Cells:
    """The cells of one text after another: `cut` to what has stayed, then `grow`.

    Attributes:
        pages: the first cells, `PAGE` in each list; such a list never changes.
        tail: the cells after them, fewer than `PAGE`.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._seen: list[Token] = []
        self._prompt: list[int] | None = None
        self._pieces = Pieces(vocabulary)
        self.pages: list[list[Cell]] = []
        self.tail: list[Cell] = []

    def cut(self, prompt: list[int], tokens: Sequence[Token]) -> bool:
        """Drop the cells of tokens that are not there any more; whether there were any."""
        before = same = len(self._seen)
        if prompt is not self._prompt:
            self._prompt, self._pieces, same = prompt, Pieces(self._vocabulary, prompt), 0
        # Tokens are objects of one place: if the last one is the same, so are all before it.
        while same and (same > len(tokens) or tokens[same - 1] is not self._seen[same - 1]):
            same -= 1
        del self._seen[same:]
        self._pieces.truncate(same)
        whole, left = divmod(same, PAGE)
        if whole < len(self.pages):
            self.tail = self.pages[whole]
            del self.pages[whole:]
        self.tail = self.tail[:left]
        return same < before

    def grow(self, tokens: Sequence[Token]) -> None:
        """Add the cells of the tokens after those that are there already."""
        for token in tokens[len(self._seen) :]:
            self._seen.append(token)
            self.tail.append(self._cell(token))
            if len(self.tail) == PAGE:
                self.pages.append(self.tail)
                self.tail = []

    def _cell(self, token: Token) -> Cell:
        show = self._vocabulary.show
        special = self._vocabulary.special(token.id)
        text = self._pieces.add(token.id)
        alternatives = [[one, show(one), _digits(p)] for one, p in token.alternatives]
        return [text, _digits(token.probability), special, alternatives]


def _digits(probability: float | None) -> float | None:
    """Three digits are enough to see, and half the size."""
    return None if probability is None else float(f"{probability:.3g}")
