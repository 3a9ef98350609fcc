"""A text as tokens: what it began with, and what the model wrote, with how sure it was. Pure.

Positions count the written tokens: 0 is the first one after the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Token:
    """One written token.

    Attributes:
        id: in the vocabulary.
        probability: that the model gave it, or None if a person put it there without being asked.
        alternatives: the most probable tokens of this place with their probabilities, best first;
            the written one may be among them.
    """

    id: int
    probability: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass
class Draft:
    """Ids of the prompt, and the tokens after it."""

    prompt: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """All of it."""
        return self.prompt + [token.id for token in self.tokens]

    @property
    def written(self) -> list[int]:
        """What came after the prompt."""
        return [token.id for token in self.tokens]

    def replace(self, position: int, ids: Sequence[int]) -> None:
        """Put ``ids`` in the place of a token and of all that follow it.

        The first keeps the alternatives of the place, with its own probability if it is one.

        Raises:
            IndexError: there is no such token, and it is not the place after the last one.
        """
        if not 0 <= position <= len(self.tokens):
            raise IndexError(
                f"position {position} is not in the text, which has {len(self.tokens)} tokens"
            )
        before = self.tokens[position] if position < len(self.tokens) else Token(-1)
        known = dict(before.alternatives) | {before.id: before.probability}
        del self.tokens[position:]
        for index, token in enumerate(ids):
            if index == 0:
                self.tokens.append(Token(token, known.get(token), before.alternatives))
            else:
                self.tokens.append(Token(token))


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids at the beginning are the same."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
