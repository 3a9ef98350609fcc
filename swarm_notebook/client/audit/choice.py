"""Which finished pieces are audited: at random, for no more than a set share of the work. Pure.

A server cannot know when: it is never asked again for what is audited, and each piece has the same
chance per token that it costs. The replay of a decode step costs its whole sequence (the keys and
values before it are computed anew), so its chance falls with the length; the expected cost is the
rate, whatever is decoded, prefilled or passed forward.

A server that was never audited is so soon, on credit: until that is paid back, no known one is.
"""

from __future__ import annotations

import random

# After about so many tokens a new server meets its first audit: within the first answer that a
# user reads, and not surely with the first request, which a liar could answer right.
STRANGER_TOKENS = 128.0


class PieceSampler:
    """Draws which pieces are audited.

    Args:
        rate: how much may be computed for audits, as a share of what is computed anyway.
        source: of randomness; None for one that nobody can predict.
    """

    def __init__(self, rate: float, source: random.Random | None = None):
        self.rate = rate
        self._source = source or random.SystemRandom()
        self._credit = 0.0

    def draw(self, tokens: int, done: float, cost: float, *, stranger: bool) -> bool:
        """Whether to audit a piece.

        Args:
            tokens: that it has.
            done, cost: what the piece took, and what its audit would take, in tokens times blocks.
            stranger: its server was never audited.
        """
        if not self.rate:
            return False
        self._credit += self.rate * done
        chance = self.rate * done / cost
        if stranger:
            chance = max(chance, tokens / STRANGER_TOKENS)
        elif self._credit < 0:
            return False
        if self._source.random() >= chance:
            return False
        self._credit -= cost
        return True
