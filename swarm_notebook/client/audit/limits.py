"""Up to which errors an answer is called honest: one table, and where its numbers come from. Pure.

Measured on a CPU (SmolLM2-135M, blocks 10:20 and 0:5, 5 texts of 66 to 160 tokens; one pass, chunks
of 1, 7 and 32 tokens with a cache, batches; 70 audits of 32 tokens per dtype, of bfloat16 and
float16 against references from both the checkpoint's and the rounded weights), largest of all:

| answers in | mean error | ratio | gain | a token, over the twin's mean |
|---|---|---|---|---|
| float32 | 7.6e-7 | | 6.1e-8 | 1.9e-6 by itself |
| bfloat16 | 1.0e-2 | 1.06 | 4.0e-4 | 6.5 |
| float16 | 1.4e-3 | 1.09 | 1.9e-4 | 6.9 |

There, lies reach at least: int8 weights ratio 1.77, states times 1.02 ratio 2.26 and gain 2.0e-2,
noise of 1 % ratio 1.42; int8 in one block of ten 1.11, which one audit does not tell.

A CPU against an H100 (ten random blocks of hidden size 2048, torch 2.11): float32 at most 8.6e-6,
bfloat16 ratio at most 1.02, gain 2.7e-3 where the dtype's own error is 5e-2. An answer that was
rounded on its way differs by up to half a unit in its last place, 2e-3 of bfloat16 and 2.4e-4 of
float16. Limits of gain and token are three times what was seen there.

Taken together, audits tell more (bfloat16, blocks 10:20, ratios of 2,048 tokens cut into parts;
honest in five ways: one pass, pieces of 7 and 32, beside another row, eager attention):

| tokens | honest, at most | int8 in one block of ten, at least | noise of 0.3 %, at least |
|---|---|---|---|
| 32 | 1.13 | 1.09 | 1.05 |
| 128 | 1.04 | 1.16 | 1.07 |
| 512 | 1.01 | 1.17 | 1.07 |

Of 10,000 further honest audits, of 500 texts (`benchmarks/audits.py`), the ratio was at most 1.20
by itself, 1.09 over 128 tokens, 1.04 over 512 and 1.03 over 2,048. So its limit falls with the
tokens that are taken together (`evidence`): 1.25, from 128 on 1.12, which finds the one block, and
from 512 on 1.06, which finds the noise. With these there was no false alarm, neither in one audit
nor in all of a kind together.

Gradients in halves, all of a pass as one vector (blocks 10:20, 0:5 and 0:30, two rows of 64 tokens,
gradients of the output at all, at a tenth and at the last of the positions; in pieces, row by row,
eager attention), largest of all:

| answers in | error | over its dtype's | gain, less its dtype's |
|---|---|---|---|
| bfloat16 | 0.10 | 1.45 | 2.1e-2 |
| float16 | 9.0e-3 | 1.6 | 3.3e-3 |

Limits are more than twice that, and half of what is to be found: a gain of 0.1, of gradients times
1.1; flipped ones have 2. (Token by token, under the limits of answers, six of 12 honest ones were
called wrong.)

Two different GPUs, and compiled blocks, have not been compared. 8-bit values on the wire differ as
much as a lie does (ratio up to 1.47), and quantised weights have no twin: neither is audited.
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
# Over the twin's error, the largest of one token.
MAX_TOKEN_RATIO = 12.0
MAX_GAIN, MAX_GAIN_OF_ERROR = 2e-3, 0.06
# Of gradients in halves as one vector.
MAX_GRADIENT_RATIO, MAX_GRADIENT_GAIN = 4.0, 0.05


def max_ratio(tokens: int) -> float:
    """What the ratio of honest answers reaches at most, over so many tokens."""
    return min((most for least, most in MAX_RATIOS.items() if tokens >= least), default=math.inf)


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
