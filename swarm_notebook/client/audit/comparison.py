"""Whether an answer is what the blocks give, up to honest rounding. Pure code.

A replay runs the recorded input through the same blocks twice: in float32 (the *reference*), and in
what the server computes in (its *twin*). Honest servers differ from each other by rounding, and how
much that is depends on the model, the span and the dtype, over a factor of ten. So the error of an
answer is not compared with a number but with the error that the dtype itself makes there:

- *ratio*: mean error of the answer over mean error of the twin, both against the reference, where
  the error of a token is ``‖x - r‖ / ‖r‖``;
- *gain*: the mean of ``⟨x - r, r⟩ / ⟨r, r⟩`` less that of the twin: states that are all a little
  too long. It finds a factor that a noisy model's ratio hides;
- *largest*: the largest error of a token over the twin's mean error: one token that was edited.

For float32 the twin is the reference, and the errors are compared with what float32 makes at most.

How far honest servers go stands in `limits`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Errors:
    """What was found over some tokens.

    Attributes:
        tokens: how many were compared.
        error, twin: sums over the tokens of their error, and of the twin's (0 for float32).
        gain: the sum of their gains, less the twin's.
        largest: the largest error of a token; over the twin's mean where there is a twin.
    """

    tokens: int = 0
    error: float = 0.0
    twin: float = 0.0
    gain: float = 0.0
    largest: float = 0.0

    @property
    def mean(self) -> float:
        """The mean error of a token."""
        return self.error / max(self.tokens, 1)

    @property
    def ratio(self) -> float | None:
        """The mean error over the twin's; None without a twin."""
        return self.error / self.twin if self.twin else None

    @property
    def mean_gain(self) -> float:
        """How much too long the states are, as a share."""
        return self.gain / max(self.tokens, 1)


def compare(
    answer: torch.Tensor,
    reference: torch.Tensor,
    twin: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Errors:
    """The errors of an answer.

    Args:
        answer, reference, twin: ``[rows, positions, hidden size]``, of any floating point dtype.
        mask: ``[rows, positions]``, 0 for positions that do not count; None: all count.
    """
    known = torch.ones(answer.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    r = reference[known].double()
    length = r.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)

    def against(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        difference = x[known].double() - r
        return difference.norm(dim=-1) / length, (difference * r).sum(-1) / length**2

    error, gain = against(answer)
    if not error.numel():
        return Errors()
    if twin is None:
        return Errors(error.numel(), float(error.sum()), 0.0, float(gain.sum()), float(error.max()))
    own, own_gain = against(twin)
    return Errors(
        error.numel(),
        float(error.sum()),
        float(own.sum()),
        float((gain - own_gain).sum()),
        float(error.max() / own.mean().clamp_min(1e-12)),
    )
