"""Steering: a vector added to the residual stream, for as long as a ``with`` block lasts.

    with steer(swarm, 14, vector, scale=4):
        swarm.model.generate(**inputs)

The vector is added at every position, those of the prompt included. It may require gradients: then
a loss trains it. Several contexts may be nested. A remote model takes one more round trip per step,
from the steered block on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from swarm_notebook.probing.subject import Subject, Target


@contextmanager
def steer(
    target: Target, block: int, vector: torch.Tensor, *, scale: float = 1.0
) -> Iterator[None]:
    """Add ``scale * vector`` to the output of a block.

    Args:
        target: a swarm or a model.
        block: which one; negative numbers count from the end.
        vector: ``[hidden]``.
        scale: how strongly.

    Raises:
        BlocksOutOfRange: the model does not have the block.
        ValueError: the vector has another length than the hidden states.
    """
    subject = Subject.of(target)
    (chosen,) = subject.chosen([block])
    hidden = subject.model.config.get_text_config().hidden_size
    if vector.shape != (hidden,):
        raise ValueError(
            f"vector: shape {list(vector.shape)}; the hidden states of this model need [{hidden}]"
        )

    def add(state: torch.Tensor) -> torch.Tensor:
        return state + scale * vector.to(state.device, state.dtype)

    with subject.editing(chosen, add):
        yield
