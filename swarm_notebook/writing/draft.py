"""A text as tokens: what it began with, and what the model wrote, with how sure it was. Pure.

Positions count the written tokens: 0 is the first one after the prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from swarm_notebook.client.servers.routing import block_runs


@dataclass(frozen=True)
class Token:
    """One written token.

    Attributes:
        id: in the vocabulary.
        probability: that the model gave it, or None if a person put it there without being asked.
        alternatives: the most probable tokens of this place with their probabilities, best first;
            the written one may be among them.
        servers: peers that had a part in what it was chosen from, where answers are audited.
    """

    id: int
    probability: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    servers: frozenset[str] = frozenset()


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

    def branch(self, position: int, ids: Sequence[int]) -> Draft:
        """Another text: this one up to a token, and ``ids`` in the place of it and what follows.

        The first keeps the alternatives of the place, with its own probability if it is one. This
        text stays as it is.

        Raises:
            IndexError: there is no such token, and it is not the place after the last one.
        """
        if not 0 <= position <= len(self.tokens):
            raise IndexError(
                f"position {position} is not in the text, which has {len(self.tokens)} tokens"
            )
        before = self.tokens[position] if position < len(self.tokens) else Token(-1)
        known = dict(before.alternatives) | {before.id: before.probability}
        new = [Token(token) for token in ids]
        if ids:
            new[0] = Token(ids[0], known.get(ids[0]), before.alternatives, before.servers)
        return Draft(self.prompt, [*self.tokens[:position], *new])

    def touched(self, peers: Collection[str]) -> list[tuple[int, int]]:
        """Runs ``(start, end)`` of written tokens in which these servers had a part."""
        tokens = enumerate(list(self.tokens))
        return block_runs(at for at, token in tokens if not token.servers.isdisjoint(peers))


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids at the beginning are the same."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
