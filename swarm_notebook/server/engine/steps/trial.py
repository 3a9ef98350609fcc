"""What it is tried with whether sessions can share calls, and how close results must come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from swarm_notebook.server.engine.kv.cache import SessionCache
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.session_state import BatchItem, SessionState, run_one

# How far results may be from those of sessions that run alone, relative to their size: some
# roundings of the dtype through a few blocks.
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}
_CLOSE_HALF = 5e-2


def is_close(difference: float | torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether results differ by no more than roundings; NaN is not close.

    Args:
        difference: relative to their size.
    """
    return bool(difference <= _CLOSE.get(dtype, _CLOSE_HALF))


@dataclass(frozen=True)
class TrialSession:
    """A session that has read its prompt.

    Attributes:
        past: how many positions that were.
        hidden: what follows, ``[rows, positions, hidden size]``.
        mask: of all, ``[rows, past + positions]``.
    """

    state: SessionState
    past: int
    hidden: torch.Tensor
    mask: torch.Tensor

    def item(self, begin: int, end: int, *, masked: bool) -> BatchItem:
        """A step of the positions ``[begin, end)`` of what follows."""
        position, span = self.past + begin, self.state.span
        mask = self.mask[:, position : self.past + end] if masked else None
        hidden = self.hidden[:, begin:end]
        step = Step((span.start, span.end), hidden, attention_mask=mask)
        return BatchItem(self.state, step, position, 0, end - begin)


def trial_sessions(
    span: Span, hidden_size: int, positions: int, cache: Callable[[], SessionCache] | None = None
) -> list[TrialSession]:
    """Two of different lengths: one row, and two of which one is padded; always the same.

    Args:
        positions: that follow their prompts.
        cache: makes a session's.
    """
    noise = torch.Generator().manual_seed(0)
    sessions = []
    for rows, past in ((1, 7), (2, 4)):
        hidden = torch.randn(rows, past + positions, hidden_size, generator=noise)
        mask = torch.ones(rows, past + positions, dtype=torch.int64)
        mask[1:, :2] = 0
        state = SessionState(span, context=None, cache=None if cache is None else cache())
        blocks = span.start, span.end
        prompt = Step(blocks, hidden[:, :past], attention_mask=mask[:, :past])
        run_one(BatchItem(state, prompt, 0, 0, past))
        sessions.append(TrialSession(state, past, hidden[:, past:], mask))
    return sessions
