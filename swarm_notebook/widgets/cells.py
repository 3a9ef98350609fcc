"""A growing text as the cells that a view colours, one per token. Pure.

A cell is a list, ``[text, probability, special, [[id, text, probability], …]]``; `js/src/tokens.js`
reads it. Old cells never change, so a view is told of the new ones only: the text is cut in two
parts, `settled`, which is sent seldom, and `tail`, which is sent with every update and kept short.
"""

from __future__ import annotations

from typing import Any

from swarm_notebook.writing import Draft, Pieces, Token, Vocabulary

TAIL = 256

Cell = list[Any]


class Cells:
    """The cells of one draft after another.

    Attributes:
        settled: the first cells. A new list whenever it changes.
        tail: the cells after them.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._seen: list[Token] = []
        self._prompt: list[int] | None = None
        self._pieces = Pieces(vocabulary)
        self.settled: list[Cell] = []
        self.tail: list[Cell] = []

    @property
    def all(self) -> list[Cell]:
        return self.settled + self.tail

    @property
    def text(self) -> str:
        """What is shown, without the marks of the format."""
        return "".join(cell[0] for cell in self.all if not cell[2])

    def follow(self, draft: Draft) -> None:
        """Show what the draft holds now; it may be growing meanwhile."""
        tokens = list(draft.tokens)
        if draft.prompt is not self._prompt:
            self._prompt, self._pieces = draft.prompt, Pieces(self._vocabulary, draft.prompt)
            self._cut(0)
        same = len(self._seen)
        # Tokens are objects of one place: if the last one is the same, so are all before it.
        while same and (same > len(tokens) or tokens[same - 1] is not self._seen[same - 1]):
            same -= 1
        self._cut(same)
        for token in tokens[same:]:
            self._seen.append(token)
            self.tail.append(self._cell(token))
        if len(self.tail) > TAIL:
            self.settled, self.tail = self.all, []

    def _cut(self, length: int) -> None:
        del self._seen[length:]
        self._pieces.truncate(length)
        if length < len(self.settled):
            self.settled, self.tail = self.settled[:length], []
        else:
            self.tail = self.tail[: length - len(self.settled)]

    def _cell(self, token: Token) -> Cell:
        show = self._vocabulary.show
        special = self._vocabulary.special(token.id)
        text = self._pieces.add(token.id)
        alternatives = [[one, show(one), _digits(p)] for one, p in token.alternatives]
        return [text, _digits(token.probability), special, alternatives]


def _digits(probability: float | None) -> float | None:
    """Three digits are enough to see, and half the size."""
    return None if probability is None else float(f"{probability:.3g}")
