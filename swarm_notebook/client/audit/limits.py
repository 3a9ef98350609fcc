"""Up to which errors an answer is called honest: one table, and where its numbers come from. Pure.

`benchmarks/audits.py` measures, for any model, span, dtype and device, and for two of them; whoever
changes a limit measures again. Servers are honest in five ways: one pass, pieces of 7 and of 32
with a cache, beside another row, eager attention; on a card also step by step through CUDA graphs
and compiled blocks. 29 November 2026, one H200 and its host's CPU, torch 2.11; audits of 32 tokens
of blocks 0:3 of the demo model and of ten random blocks (hidden size 1,024, Llama and Qwen 3),
largest of all:

| answers in, by what / replayed by | audits | ratio | over 128 | over 512 | gain | a token |
|---|---|---|---|---|---|---|
| bfloat16 at 4.5 bits, card / CPU | 2,496 | 1.22 | 1.08 | 1.02 | 1.6e-3 | 9.1 |
| the same, CPU / card | 2,240 | 1.15 | 1.06 | 1.03 | 1.3e-3 | 14.1 |
| the same, card / card | 6,528 | 1.16 | 1.07 | 1.03 | 1.6e-3 | 7.7 |
| bfloat16 at 8.5 bits, card / CPU | 5,568 | 1.18 | 1.09 | 1.03 | 1.4e-3 | 9.5 |

With random blocks (bfloat16, float16, float32 and 4.5 bits between card and CPU both ways, and
card and card: 26,192 audits) there was no alarm at all. So of 43,024 honest audits one would have
been called wrong by the limit of then, of 12 for a token; it is 24 now, and of those over
`comparison.OUTLIER` two are wanted. On CPUs alone there were 3,400 in bfloat16 and 3,300 in
float32, blocks 10:20, by the mean of errors in the place of their geometric mean: none.

There lies were found by the first audit, in 100 of 100 texts each, in float32, float16 and bfloat16
(server on the CPU, replay on the card, or the other way round): states times 1.02, zeros, noise of
1 %, stale states, a skipped block, other weights, int8 and int4 weights; an edited token in 299 of
300, and in the other one by the second.

The ratio is the geometric mean because in a model's first blocks single tokens have ten times the
error of others: blocks 0:4 in bfloat16 on a CPU, by the mean honest servers reach 1.26 and int8
weights begin at 1.67; by the geometric mean it is 1.16 and 1.91 (320 audits).

Two honest servers of float32 differ by 7.6e-7 in the mean (CPU) to 8.6e-6 (CPU against an H100). An
answer that was rounded on its way differs by up to half a unit in its last place, 2e-3 of bfloat16
and 2.4e-4 of float16.

Taken together, audits tell more. int8 in one block of ten has a ratio of 1.16 or more over 128
tokens, noise of 0.3 % of 1.07 or more over 512 (bfloat16, blocks 10:20). So the limit falls with
the tokens that are taken together (`evidence`): 1.25, from 128 on 1.12, which finds the one block,
and from 512 on 1.06, which finds the noise.

Gradients in halves, all of a pass as one vector (blocks 10:20, 0:5 and 0:30, two rows of 64 tokens,
gradients of the output at all, at a tenth and at the last of the positions; in pieces, row by row,
eager attention), largest of all:

| answers in | error | over its dtype's | gain, less its dtype's |
|---|---|---|---|
| bfloat16 | 0.10 | 1.45 | 2.1e-2 |
| float16 | 9.0e-3 | 1.6 | 3.3e-3 |

Limits are more than twice that, and half of what is to be found: a gain of 0.1, of gradients times
1.1; flipped ones have 2. (Token by token, under the limits of answers, six of 12 honest ones were
called wrong.) Gradients of a card have not been compared, nor two cards of different kinds.

8-bit values on the wire differ as much as a lie does (ratio up to 1.47): they are not audited.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from swarm_notebook.client.audit.comparison import Errors

# Below so many tokens a few tokens' rounding decides over the ratio.
MIN_TOKENS = 32

# From so many tokens on; see the second table.
MAX_RATIOS = {MIN_TOKENS: 1.25, 128: 1.12, 512: 1.06}
MOST_TOKENS = max(MAX_RATIOS)  # more tell no more
# Of the mean over 32 tokens, by what the answer's values were rounded to, where there is no twin.
MAX_ERROR = {torch.float32: 3e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
# Of a token, over the limit of the mean: attention to few tokens magnifies what differs.
MAX_TOKEN = 30.0
# Over the twin's error, the largest of one token; and in how many tokens there may be one with more
# than `comparison.OUTLIER`, besides a first one.
MAX_TOKEN_RATIO = 24.0
TOKENS_PER_OUTLIER = 256
MAX_GAIN, MAX_GAIN_OF_ERROR = 2e-3, 0.06
# Of gradients in halves as one vector.
MAX_GRADIENT_RATIO, MAX_GRADIENT_GAIN = 4.0, 0.05


def max_ratio(tokens: int) -> float:
    """What the ratio of honest answers reaches at most, over so many tokens."""
    return min((most for least, most in MAX_RATIOS.items() if tokens >= least), default=math.inf)


def max_outliers(tokens: int) -> int:
    """How many of so many tokens of honest answers may be far from the twin's."""
    return 1 + tokens // TOKENS_PER_OUTLIER


def what_is_wrong(errors: Errors, answered: torch.dtype) -> str:
    """Why an answer cannot be honest; an empty text if it can.

    Args:
        errors: of at least `MIN_TOKENS` tokens.
        answered: what the answer's values were rounded to on their way.
    """
    return _over(_measures(errors, answered))


def _over(measures: Iterator[tuple[str, float, float]]) -> str:
    for what, found, most in measures:
        if found > most:
            return f"{what} {found:.3g}, honest servers reach {most:.3g}"
    return ""


def _of_gradients(errors: Errors) -> Iterator[tuple[str, float, float]]:
    yield "error over that of their dtype", errors.ratio or 0.0, MAX_GRADIENT_RATIO
    yield "gain", abs(errors.mean_gain), MAX_GRADIENT_GAIN


def judged(
    states: Errors, weights: Errors, answered: torch.dtype, *, back: bool
) -> tuple[Errors, str]:
    """Why an answer cannot be honest, if it cannot, and the errors that say so.

    Args:
        states: of hidden states, or of their gradients.
        weights: of the gradients of weights, if there are any.
        back: it was a backward pass.
    """
    if not back:
        return states, what_is_wrong(states, answered)
    for errors, name in ((states, "states"), (weights, "weights")):
        found = _of_gradients(errors) if errors.ratio is not None else _measures(errors, answered)
        why = _over(found) if errors.tokens else ""
        if why:
            return errors, f"gradients of {name}: {why}"
    return states, ""


def _measures(errors: Errors, answered: torch.dtype) -> Iterator[tuple[str, float, float]]:
    if errors.ratio is None:
        limit = MAX_ERROR[answered]
        yield "mean error", errors.mean, limit
        yield "error of a token", errors.largest, MAX_TOKEN * limit
        return
    yield "error over that of its dtype", errors.ratio, max_ratio(errors.tokens)
    gain = MAX_GAIN + MAX_GAIN_OF_ERROR * errors.twin / errors.tokens
    yield "gain", abs(errors.mean_gain), gain
    yield "error of a token over that of its dtype", errors.largest, MAX_TOKEN_RATIO
    yield "tokens far from their dtype's", errors.outliers, max_outliers(errors.tokens)
