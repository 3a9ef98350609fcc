"""What listens to ``generate``, in the roles that transformers has for it.

Per token ``generate`` calls a logits processor, then (once it has chosen) the stopping criteria and
the streamer. On some devices the last two lag by one token, so what the processor saw waits in a
queue for its token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from swarm_notebook.writing.draft import Token


class Predictions(LogitsProcessor):
    """Sees the scores of every next token, and changes nothing.

    They are the model's own, after penalties if its generation config has some, before temperature
    and the choice of the top.
    """

    def __init__(self, alternatives: int):
        self._count = alternatives
        self._waiting: deque[tuple[torch.Tensor, float, tuple[tuple[int, float], ...]]] = deque()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        row = scores[0].detach()
        total = torch.logsumexp(row, 0)
        values, best = torch.topk(row, min(self._count, row.shape[0]))
        pairs = zip(best.tolist(), torch.exp(values - total).tolist(), strict=True)
        self._waiting.append((row, float(total), tuple(pairs)))
        return scores

    def take(self, token: int) -> Token:
        """The chosen token, with what was seen when it was."""
        row, total, alternatives = self._waiting.popleft()
        probability = float(torch.exp(row[token] - total))
        return Token(token, probability, alternatives)


class Chosen(BaseStreamer):
    """Hands on each token that ``generate`` has chosen; the prompt comes first and is skipped."""

    def __init__(self, hand_on: Callable[[int], None]):
        self._hand_on, self._begun = hand_on, False

    def put(self, value: torch.Tensor) -> None:
        if self._begun:
            self._hand_on(int(value.flatten()[0]))
        self._begun = True

    def end(self) -> None:
        """Nothing is held back."""


class StopWhen(StoppingCriteria):
    """Ends ``generate`` after the present token."""

    def __init__(self, asked: Callable[[], bool]):
        self._asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._asked(), device=input_ids.device)
