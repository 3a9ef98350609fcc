"""Who gets how many bits: the least loss within a budget, found exactly.

A choice for each matrix has a size and a loss, and losses add up. That is a knapsack with one
choice per item, solved by dynamic programming over sizes: exact for sizes that are rounded up to
units, so the budget is never exceeded. Sizes of matrices have large common divisors, which then are
the unit, and nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Parts of the budget at most: 200 matrices with five choices take a second then.
UNITS = 1 << 16


@dataclass(frozen=True)
class Choice:
    """What one matrix may be.

    Attributes:
        size: in bits.
        loss: in any unit, the same for all.
    """

    size: float
    loss: float


def allocate(items: Sequence[Sequence[Choice]], budget: float) -> list[int] | None:
    """The index of each item's choice with the least sum of losses; None if nothing fits.

    Args:
        budget: the largest sum of sizes.
    """
    divisor = math.gcd(*(math.ceil(choice.size) for choices in items for choice in choices))
    unit = max(float(divisor), budget / UNITS)
    most = int(budget / unit)
    # best[u]: the least loss of the items so far in at most u units.
    best = np.zeros(most + 1)
    taken: list[np.ndarray] = []
    for choices in items:
        after = np.full(most + 1, np.inf)
        which = np.zeros(most + 1, np.int16)
        for index, choice in enumerate(choices):
            # What is a whole number of units but for rounding is that many.
            units = int(np.ceil(choice.size / unit - 1e-6))
            if units > most:
                continue
            loss = best[: most + 1 - units] + choice.loss
            better = loss < after[units:]
            after[units:][better] = loss[better]
            which[units:][better] = index
        best = after
        taken.append(which)
    left = most
    if not np.isfinite(best[left]):
        return None
    found: list[int] = []
    for choices, which in zip(reversed(items), reversed(taken), strict=True):
        found.append(int(which[left]))
        left -= int(np.ceil(choices[found[-1]].size / unit - 1e-6))
    return found[::-1]
