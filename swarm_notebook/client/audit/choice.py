"""Which finished pieces are audited: at random, for no more than a set share of the work. Pure.

A server cannot know when: it is never asked again for what is audited, and each piece has the same
chance per token that it costs. The replay of a decode step costs its whole sequence (the keys and
values before it are computed anew), so its chance falls with the length; the expected cost is the
rate, whatever is decoded, prefilled or passed forward.

There are two costs, what is computed and what travels, and neither is more than the rate. They
differ where servers hand over to each other: a replay's input and answer pass the notebook, of the
work itself only the answers.

A server that was never audited is so soon, on credit: until that is paid back, no known one is.

Of a prompt a text needs the last answer only, and an audit more (`share_asked`). They are asked for
in so many prompts that they add no more than `MORE` to what travels, and these are audited the more
often for it. What a server was asked for it knows: see SECURITY.md.
"""

from __future__ import annotations

import random

# After about so many tokens a new server meets its first audit: within the first answer that a
# user reads, and not surely with the first request, which a liar could answer right.
STRANGER_TOKENS = 128.0

# What was not audited, as there was too little to compare, is made up for later: the chance of each
# piece grows by so much of what was not spent. Without it, half of it was left with texts of 64
# tokens; with more, whoever knows when a server was audited last knows when it will be again.
CATCH_UP, MOST_UNSPENT = 0.01, 4.0

# Of what travels for prompts: with prints (half a percent of decoding), less than 2 % together.
MORE = 0.01


def share_asked(states: float, more: int) -> float:
    """In which share of prompts to ask for more answers than are needed.

    Args:
        states: that travel for such a prompt anyhow.
        more: how many more would.
    """
    return min(1.0, MORE * states / more) if more > 0 else 1.0


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

    def draw(
        self, tokens: int, done: float, cost: float, *, stranger: bool, asked: float = 1.0
    ) -> bool:
        """Whether to audit a piece.

        Args:
            tokens: that it has.
            done, cost: what the piece took, and what its audit would take, in tokens times blocks.
            stranger: its server was never audited.
            asked: the share of such pieces of which there is enough to compare (`share_asked`).
        """
        if not self.rate:
            return False
        self._credit += self.rate * done
        unspent = CATCH_UP * min(max(self._credit, 0.0), MOST_UNSPENT * cost)
        chance = (self.rate * done + unspent) / cost / asked
        if stranger:
            chance = max(chance, tokens / STRANGER_TOKENS)
        elif self._credit < 0:
            return False
        if self._source.random() >= chance:
            return False
        self._credit -= cost
        return True

    def give_back(self, cost: float) -> None:
        """What was drawn cannot be audited."""
        self._credit += cost

    def skip(self, done: float) -> None:
        """A piece has been computed of which there is not enough to audit yet."""
        self._credit += self.rate * done
