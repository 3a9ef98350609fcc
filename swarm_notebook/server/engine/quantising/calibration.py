"""States to measure on: a text that ships with the package, embedded by the model itself.

The text is in two halves. Choices are made on the first, and judged on the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swarm_notebook.checkpoint.parts.partial import load_edges

if TYPE_CHECKING:
    from swarm_notebook.checkpoint.files.source import ModelSource

# Positions of each half. Errors of 64 tokens rank the matrices of a block as those of 256 do (demo
# model), and every one is a pass through the block for each matrix and each number of bits.
POSITIONS = 64

TEXTS = (
    (
        "The ferry leaves the island at seven in the morning, when the fog still lies over the "
        "water and the gulls are quiet. Anna counts the crates on the quay: twelve of apples, "
        'three of honey, and one that nobody has claimed since Tuesday. "If it rains again," says '
        'the captain, "we shall have to wait for the tide." She writes the number down, looks at '
        "the clock, and thinks of the 48 kilometres to the mainland, where the market opens at "
        "nine and the price of a kilo has fallen by a third since spring."
    ),
    (
        "def mean(values): return sum(values) / len(values). A function like this fails for an "
        "empty list, because nothing can be divided by zero. In 1905 a clerk in Bern asked what a "
        "clock on a tower would show to somebody who rode away from it on a ray of light. Water "
        "boils at 100 degrees at sea level, and at a lower temperature in the mountains. Why? The "
        "pressure of the air is smaller there, so the molecules need less energy to leave the "
        "liquid; that is also why an egg takes longer to cook."
    ),
)


def calibration_states(source: ModelSource, dtype: torch.dtype) -> torch.Tensor:
    """``[2, POSITIONS, hidden size]``: the embeddings of the two halves, in ``dtype``."""
    model, _ = load_edges(source, dtype=dtype)
    with torch.inference_mode():
        return model.get_input_embeddings()(calibration_tokens(source)).clone()


def calibration_tokens(source: ModelSource) -> torch.Tensor:
    """``[2, POSITIONS]``: the tokens of the two halves.

    For a model without a tokenizer they are spread over its vocabulary.
    """
    tokenizer = source.tokenizer()
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        size = source.config().vocab_size
        return torch.randint(size, (len(TEXTS), POSITIONS), generator=generator)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    # A vocabulary of few letters has more tokens in a text, never fewer than words.
    return torch.tensor([(row * POSITIONS)[:POSITIONS] for row in rows])
