"""Up to which errors an answer is called honest: one table, and where its numbers come from. Pure.

`benchmarks/audits.py` measures, for any model, span, dtype and device, and for two of them; whoever
changes a limit measures again. Servers are honest in five ways: one pass, pieces of 7 and of 32
with a cache, beside another row, eager attention; on a card also step by step through CUDA graphs
and compiled blocks. 29 November 2026, one H200 and its host's CPU, torch 2.11; audits of 32 tokens
of blocks 0:3 of the demo model and of ten random blocks (hidden size 1,024, Llama and Qwen 3),
largest of all ways, by what the blocks are and what their answers are rounded to; a card against
its host's CPU, both ways, and against itself:

| blocks, answers in | audits | ratio | over 128 | over 512 | over 2,048 | gain | a token |
|---|---|---|---|---|---|---|---|
| demo, bfloat16 | 42,560 | 1.24 | 1.11 | 1.064 | 1.047 | 2.3e-3 | 22.7 |
| demo, float16 | 21,280 | 1.25 | 1.10 | 1.063 | 1.044 | 5.1e-4 | 15.5 |
| demo, bfloat16 at 4.5 and 8.5 bits | 17,504 | 1.20 | 1.07 | 1.03 | 1.02 | 1.9e-3 | 13.0 |
| random, the same and 4.5 bits | 22,144 | 1.08 | 1.06 | 1.04 | 1.04 | 6.4e-4 | 1.4 |

With 30,912 audits of float32 they are 134,400, of which one was called wrong, by a ratio just over
1.25, then the limit of a single audit; and in 8 of 25 runs several together were, by ratios over
1.06 at 512 tokens, the limit then, all of the demo model's first blocks and nearly all of another
way to attend (`eager`). The limits of now are over all that the table has; these audits were not
run again under them.

There lies were found by the first audit, in 100 of 100 texts each, under the limits of then (1.25,
and 24 for a token), in float32, float16 and bfloat16
(server on the CPU, replay on the card, or the other way round): states times 1.02, zeros, noise of
1 %, stale states, a skipped block, other weights, int8 and int4 weights; an edited token in 298 of
300, and in the others by the second. Under the limits of now all but int8, int4 and the edited
token were tried again, in bfloat16 and float16: the same.

The ratio is the geometric mean because in a model's first blocks single tokens have ten times the
error of others: blocks 0:4 in bfloat16 on a CPU, by the mean honest servers reach 1.26 and int8
weights begin at 1.67; by the geometric mean it is 1.16 and 1.91 (320 audits).

Two honest servers of float32 differ by 7.6e-7 in the mean (CPU) to 8.6e-6 (CPU against an H100). An
answer that was rounded on its way differs by up to half a unit in its last place, 2e-3 of bfloat16
and 2.4e-4 of float16.

Taken together, audits tell more. int8 in one block of ten has a ratio of 1.16 or more over 128
tokens, noise of 0.3 % of 1.07 or more over 512 (bfloat16, blocks 10:20). So the limit falls with
the tokens that are taken together (`evidence`), between what honest servers reach and what lies
begin at: 1.4 for one audit (int8 weights begin at 1.67), from 128 on 1.135, which finds the one
block, from 512 on 1.085, and from 2,048 on 1.06, which finds the noise.

None of them is passed in the long run. Of the five ways only `eager` differs from one by itself,
which more tokens do not average out; all else they do. The logarithm of its ratio has, on a CPU in
bfloat16, blocks 10:20 (200 audits; `--evidence 6400`), a mean of 0.017 and, over 32, 128, 512 and
2,048 tokens, a standard deviation of 0.034, 0.019, 0.010 and 0.005: the limits are 9, 6, 6 and 9 of
these above the mean. In the first blocks, where the maxima above say 0.03 for the mean and 0.045,
0.019, 0.009 and 0.005 for the rest, they are 7, 5, 6 and 5 of these; 5 is one sum in three million,
and a sum counts once two witnesses have come to it. In the same way noise of 0.3 %, with a mean of
0.075 and a deviation of 0.004 over 2,048 tokens, is 4 of these above the last one, and int8 in one
block of ten (0.178; 0.021 over 128) 2 above the second, 9 above the third.

Gradients in halves, all of a pass as one vector (blocks 10:20, 0:5 and 0:30, two rows of 64 tokens,
gradients of the output at all, at a tenth and at the last of the positions; in pieces, row by row,
eager attention), largest of all:

| answers in | error | over its dtype's | gain, less its dtype's |
|---|---|---|---|
| bfloat16 | 0.10 | 1.45 | 2.1e-2 |
| float16 | 9.0e-3 | 1.6 | 3.3e-3 |

Limits are more than twice that, and half of what is to be found: a gain of 0.1, of gradients times
1.1; flipped ones have 2. (Token by token, under the limits of answers, six of 12 honest ones were
called wrong.) A card in float32 against its CPU, and one in bfloat16 against itself:
400 audits each, none called wrong. In 16 bits gradients of a card have not been compared with a
CPU's, nor two cards of different kinds.

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
MAX_RATIOS = {MIN_TOKENS: 1.4, 128: 1.135, 512: 1.085, 2048: 1.06}
MOST_TOKENS = max(MAX_RATIOS)  # more tell no more
# Of the mean over 32 tokens, by what the answer's values were rounded to, where there is no twin.
MAX_ERROR = {torch.float32: 3e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
# Of a token, over the limit of the mean: attention to few tokens magnifies what differs.
MAX_TOKEN = 30.0
# Over the twin's error, the largest of one token; and in how many tokens there may be one with more
# than `comparison.OUTLIER`, besides a first one.
MAX_TOKEN_RATIO = 40.0
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
