"""Steering: a vector added to the residual stream, for as long as a ``with`` block lasts.

    vector = steering_vector(swarm, happy, sad, block=14)     # texts in pairs, or any numbers
    with vector.steer(swarm, scale=4):
        swarm.model.generate(**inputs)
    vector.save("happy.safetensors")                          # load_vector reads it back

The vector is added at every position, those of the prompt included. It may require gradients: then
a loss trains it. Several contexts may be nested. A remote model takes one more round trip per step,
from the steered block on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from swarm_notebook.model.home import which
from swarm_notebook.probing.states import Pool, hidden_states
from swarm_notebook.probing.subject import Subject, Target
from swarm_notebook.report.formatting import model_title

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SteeringVector:
    """A direction in the states of one block.

    Attributes:
        model: the name of the model that it was made with.
        block: whose output it is added to.
        vector: ``[hidden]``, float32.
    """

    model: str
    block: int
    vector: torch.Tensor

    def __repr__(self) -> str:
        size = f"norm {float(self.vector.norm()):.3g}"
        return f"<SteeringVector of {model_title(self.model)}, block {self.block}, {size}>"

    def steer(self, target: Target, scale: float = 1.0) -> AbstractContextManager[None]:
        """`steer` with this vector, for as long as a ``with`` block lasts."""
        return steer(target, self.block, self.vector, scale=scale)

    def save(self, path: str | Path) -> Path:
        """Write it as one safetensors file."""
        path = Path(path)
        metadata = {"model": self.model, "block": str(self.block)}
        save_file({"vector": self.vector.contiguous()}, path, metadata)
        return path


def load_vector(path: str | Path) -> SteeringVector:
    """Read what `SteeringVector.save` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "vector" not in file.keys() or not {"model", "block"} <= metadata.keys():  # noqa: SIM118
            raise ValueError(f"{path}: not a steering vector")
        return SteeringVector(metadata["model"], int(metadata["block"]), file.get_tensor("vector"))


def steering_vector(
    target: Target,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    block: int,
    pool: Pool = "last",
    batch_size: int = 16,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> SteeringVector:
    """The mean difference of a block's states between texts that have a property and that lack it.

    (Rimsky et al., 2023, who take pairs of texts that differ in their last token alone.)

    Args:
        target: a swarm or a model.
        positive, negative: texts with the property, and without it.
        block: whose output; negative numbers count from the end.
        pool: the state of a text: of its last token, or the mean of all.
        batch_size: texts per pass.
        tokenizer: for a model alone; a swarm has its own.

    Raises:
        ValueError: one of the lists is empty.
        BlocksOutOfRange: the model does not have the block.
    """
    if not positive or not negative:
        raise ValueError("positive and negative: both need at least one text")
    subject = Subject.of(target, tokenizer)
    (chosen,) = which(block, len(subject.blocks))
    states = hidden_states(
        target,
        [*positive, *negative],
        blocks=chosen,
        pool=pool,
        dtype=torch.float32,
        batch_size=batch_size,
        tokenizer=tokenizer,
    )[chosen]
    with_it, without = states[: len(positive)], states[len(positive) :]
    return SteeringVector(subject.name, chosen, with_it.mean(0) - without.mean(0))


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
