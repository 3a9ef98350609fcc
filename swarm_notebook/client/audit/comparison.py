"""Whether an answer is what the blocks give, up to honest rounding. Pure code.

A replay runs the recorded input through the same blocks twice: in float32 (the *reference*), and in
what the server computes in (its *twin*). Honest servers differ from each other by rounding, and how
much that is depends on the model, the span and the dtype, over a factor of ten. So the error of an
answer is not compared with a number but with the error that the dtype itself makes there:

- *ratio*: error of the answer over error of the twin, both against the reference, where the error
  of a token is ``‖x - r‖ / ‖r‖``; the geometric mean over the tokens, because a few of them may
  have a hundred times the error of others, and would decide over a mean by their own rounding;
- *gain*: the mean of ``⟨x - r, r⟩ / ⟨r, r⟩`` less that of the twin: states that are all a little
  too long. It finds a factor that a noisy model's ratio hides. No token counts for more than some
  times what all of them may have;
- *largest*: the largest error of a token over the twin's, of this token or in the mean: one token
  that was edited. Of some 500,000 tokens of honest servers one had 14 times the twin's error, so
  those of more than `OUTLIER` are counted as well: two of them are no accident.

Gradients are compared in the same way: those of states token by token and those of weights tensor
by tensor, each in a comparison of its own. A token that has hardly any part in the loss has a
gradient of hardly more than rounding: its error counts against the root mean square of all. In
halves most of the error lies in few tokens and tensors, not the same ones each time; so there all
of them are one vector, and what is compared is its error and its gain.

For float32 the twin is the reference, and the errors are compared with what float32 makes at most.

How far honest servers go stands in `limits`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch

from swarm_notebook.client.passes.backward import PassGradients

_TINY = torch.finfo(torch.float32).tiny
# Of the longest gradient among those of weights.
_LEAST_SHARE = 1e-3
# Of the twin's mean error: less of a token counts as so much. A token that repeats has none.
_LEAST_TWIN = 0.1
# Of the twin's error: a token with less counts as so much, lest exact ones make up for wrong ones.
_LEAST_RATIO = 0.5
OUTLIER = 10.0
# What a token's gain counts for at most, beside the twin's mean error: five times the limit.
_MOST_GAIN = 0.01


Result: TypeAlias = torch.Tensor | PassGradients
"""What a piece gives: hidden states, or the gradients of a backward pass."""


@dataclass(frozen=True)
class Errors:
    """What was found over some tokens.

    Attributes:
        tokens: how many were compared; 1 for gradients as one vector.
        error, twin: sums over the tokens of their error, and of the twin's (0 for float32).
        gain: the sum of their gains, less the twin's.
        largest: the largest error of a token; over the twin's where there is a twin.
        ratios: the sum of the logarithms of their errors over the twin's.
        outliers: how many have more than `OUTLIER` times the twin's error.
    """

    tokens: int = 0
    error: float = 0.0
    twin: float = 0.0
    gain: float = 0.0
    largest: float = 0.0
    ratios: float = 0.0
    outliers: int = 0

    def __add__(self, other: Errors) -> Errors:
        """Of both together."""
        return Errors(
            self.tokens + other.tokens,
            self.error + other.error,
            self.twin + other.twin,
            self.gain + other.gain,
            max(self.largest, other.largest),
            self.ratios + other.ratios,
            self.outliers + other.outliers,
        )

    @property
    def mean(self) -> float:
        """The mean error of a token."""
        return self.error / max(self.tokens, 1)

    @property
    def ratio(self) -> float | None:
        """The geometric mean of errors over the twin's; None without a twin."""
        return math.exp(self.ratios / self.tokens) if self.twin else None

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
    length = r.norm(dim=-1).clamp_min(_TINY)
    own = None if twin is None else _differences(twin[known], r, length)
    return _summed(_differences(answer[known], r, length), own)


def compare_gradients(
    answer: PassGradients,
    reference: PassGradients,
    twin: PassGradients | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[Errors, Errors]:
    """The errors of gradients, of states and of weights: each as one vector where there is a twin.

    A gradient of weights that the answer lacks counts as zero.

    Args:
        mask: ``[rows, positions]``, 0 where the gradient of the input does not count.
    """
    if twin is not None:
        three = (answer, reference, twin)
        states = _of_one(*(_stacked(one, mask) for one in three))
        return states, _of_one(*(_all_weights(one, reference) for one in three))
    r = _stacked(reference, mask).double()
    length = r.norm(dim=-1).square().mean().sqrt().clamp_min(_TINY)
    states = _summed(_differences(_stacked(answer, mask), r, length))
    if not reference.weights:
        return states, Errors()
    lengths = {name: weight.double().norm() for name, weight in reference.weights.items()}
    # As with tokens: some have a gradient of zero but for rounding, such as biases of keys.
    least = max(_LEAST_SHARE * float(max(lengths.values())), _TINY)
    each = []
    for name, weight in reference.weights.items():
        one = weight.double().flatten()
        given = answer.weights.get(name, torch.zeros_like(one)).flatten()
        each.append(_differences(given, one, lengths[name].clamp_min(least)))
    errors, gains = zip(*each, strict=True)
    return states, _summed((torch.stack(errors), torch.stack(gains)))


def errors_of(
    answer: Result, reference: Result, twin: Result | None, mask: torch.Tensor
) -> tuple[Errors, Errors]:
    """Of states or their gradients, and of gradients of weights."""
    if isinstance(answer, torch.Tensor):
        return compare(answer, reference, twin, mask), Errors()  # type: ignore[arg-type]
    return compare_gradients(answer, reference, twin, mask)  # type: ignore[arg-type]


def _stacked(gradients: PassGradients, mask: torch.Tensor | None) -> torch.Tensor:
    """Those of states and prompts, ``[tokens, hidden size]``."""
    given = gradients.input.flatten(0, -2) if mask is None else gradients.input[mask.bool()]
    prompts = [gradients.prompts[block].flatten(0, -2) for block in sorted(gradients.prompts)]
    return torch.cat([given, *prompts])


def _all_weights(gradients: PassGradients, like: PassGradients) -> torch.Tensor:
    """Those of weights one behind the other, as many as another one has."""
    found = [
        gradients.weights.get(name, torch.zeros_like(weight)).flatten()
        for name, weight in sorted(like.weights.items())
    ]
    return torch.cat(found) if found else torch.zeros(0)


def _of_one(x: torch.Tensor, r: torch.Tensor, twin: torch.Tensor) -> Errors:
    """The errors of one long vector."""
    x, r, twin = (one.flatten().double() for one in (x, r, twin))
    if not r.numel():
        return Errors()
    length = r.norm().clamp_min(_TINY)
    ours, theirs = (_differences(one[None], r, length) for one in (x, twin))
    return _summed(ours, theirs)


def _differences(
    x: torch.Tensor, r: torch.Tensor, length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Error and gain of vectors ``[..., size]``, as shares of ``length``."""
    difference = x.detach().double() - r
    return difference.norm(dim=-1) / length, (difference * r).sum(-1) / length**2


def _summed(
    found: tuple[torch.Tensor, torch.Tensor], own: tuple[torch.Tensor, torch.Tensor] | None = None
) -> Errors:
    """Of vectors together, beside those of the twin."""
    error, gain = found
    if not error.numel():
        return Errors()
    if own is None:
        return Errors(error.numel(), float(error.sum()), 0.0, float(gain.sum()), float(error.max()))
    of_twin = own[0]
    mean = of_twin.mean().clamp_min(_TINY)
    ratios = error / of_twin.clamp_min(_LEAST_TWIN * mean)
    over = error / of_twin.clamp_min(mean)
    gain = gain - own[1]
    if gain.numel() > 1:
        most = float(mean) + _MOST_GAIN
        gain = gain.clamp(-most, most)
    return Errors(
        error.numel(),
        float(error.sum()),
        float(of_twin.sum()),
        float(gain.sum()),
        float(over.max()),
        float(ratios.clamp_min(_LEAST_RATIO).log().sum()),
        int((over > OUTLIER).sum()),
    )
