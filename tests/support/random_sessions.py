"""Sessions that go their own random ways, and what each of their steps gives when it runs alone.

A `RandomSession` makes up steps from a seed (prefills, tokens, rollbacks, rows that are selected,
repeated or dropped, padding, states of inner blocks, blocks that are run again from a changed
input) and runs them by itself, in this process. So all steps of a session and their outputs can be
known before it is sent to a server.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.session_state import BatchItem, SessionState, run_one


class RandomSession:
    """A session of the blocks of ``span``, alone."""

    def __init__(self, span: Span, hidden_size: int, seed: int, longest: int = 14):
        self.span, self.hidden_size, self.longest = span, hidden_size, longest
        self.state = SessionState(span, context=None)
        self.padded = seed % 2 == 1
        self._random = random.Random(seed)
        self._noise = torch.Generator().manual_seed(seed)

    def step(self) -> Step:
        """A next step that may follow."""
        cache, dice = self.state.cache, self._random
        blocks = (self.span.start, self.span.end)
        fields: dict[str, Any] = {}
        if cache.empty:
            rows, length = dice.randint(1, 3), dice.randint(1, self.longest)
        elif dice.random() < 0.15:
            # A hook changed the input of the second block: it and those behind run again.
            hidden = self._hidden(cache.rows, 1)
            return Step((blocks[0] + 1, blocks[1]), hidden, position=cache.length - 1)
        else:
            rows, length = cache.rows, dice.choice([1, 1, 1, 3])
            fields["position"] = cache.length
            if dice.random() < 0.3:
                fields["position"] = dice.randint(0, cache.length)
            if dice.random() < 0.3:
                rows = dice.randint(1, 3)
                fields["row_ids"] = [dice.randrange(cache.rows) for _ in range(rows)]
        if self.padded and (cache.empty or dice.random() < 0.2):
            mask = torch.ones(rows, length, dtype=torch.int64)
            mask[rows - 1, : length // 2] = 0
            fields["attention_mask"] = mask
            fields["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + cache.length
        if dice.random() < 0.3:
            fields["states"] = tuple(sorted(dice.sample(range(*blocks), 2)))
        return Step(blocks, self._hidden(rows, length), **fields)

    def run(self, step: Step) -> list[torch.Tensor]:
        """What the step gives."""
        return run_one(prepared(self.state, step))

    def _hidden(self, rows: int, length: int) -> torch.Tensor:
        return torch.randn(rows, length, self.hidden_size, generator=self._noise)


def prepared(state: SessionState, step: Step) -> BatchItem:
    """A step that has been checked and has its memory, as `session` does it; to be run whole."""
    position = state.check(step)
    needed = state.needs(step, position)
    if needed is not None:
        state.cache.reserve(needed[0] // step.rows)
    return BatchItem(state, step, position, 0, step.length)
