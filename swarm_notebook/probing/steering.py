"""Steering: a vector added to the residual stream, for as long as a ``with`` block lasts.

    vector = steering_vector(swarm, happy, sad, block=14)     # texts in pairs, or any numbers
    with vector.steer(swarm, scale=4):
        swarm.model.generate(**inputs)
    vector.sweep(swarm, "I opened the letter and")            # what each strength makes of a text
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
from swarm_notebook.probing.grid import Cell, Legend, as_html
from swarm_notebook.probing.states import Pool, hidden_states
from swarm_notebook.probing.subject import Subject, Target, Text
from swarm_notebook.report.formatting import data_frame, model_title, text_table

if TYPE_CHECKING:
    import pandas as pd
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

    def sweep(
        self,
        target: Target,
        text: Text,
        strengths: Sequence[float] = (-4, -2, 0, 2, 4),
        *,
        max_new_tokens: int = 24,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Sweep:
        """What the model makes of a text at several strengths, greedily; all are one batch.

        Args:
            target: a swarm or a model.
            text: what is continued as it is, or its token ids.
            strengths: how many times the vector; 0 is the model as it is.
            max_new_tokens: how many tokens each text gets at most.
            tokenizer: for a model alone; a swarm has its own.

        Raises:
            ValueError: there are no strengths, or no tokenizer.
        """
        subject = Subject.of(target, tokenizer)
        if not strengths or subject.tokenizer is None:
            raise ValueError("strengths: none given" if not strengths else "tokenizer: give one")
        ids = subject.ids(text)
        scales = torch.tensor(strengths, dtype=torch.float32)[:, None, None]

        def add(state: torch.Tensor) -> torch.Tensor:
            return state + (scales * self.vector).to(state.device, state.dtype)

        rows = ids.expand(len(strengths), -1).to(subject.model.device)
        with subject.at_rest() as model, subject.editing(self.block, add):
            found = model.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        texts = subject.tokenizer.batch_decode(found[:, len(ids) :], skip_special_tokens=True)
        said = subject.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return Sweep(model_title(subject.name), self.block, str(said), list(strengths), texts)

    def save(self, path: str | Path) -> Path:
        """Write it as one safetensors file."""
        path = Path(path)
        metadata = {"model": self.model, "block": str(self.block)}
        save_file({"vector": self.vector.contiguous()}, path, metadata)
        return path


@dataclass(frozen=True)
class Sweep:
    """What a model has made of one text at several strengths of a vector.

    Attributes:
        block: where the vector was added.
        prompt: the text that was continued.
        strengths: how many times the vector.
        texts: the continuation at each strength.
    """

    model: str
    block: int
    prompt: str
    strengths: list[float]
    texts: list[str]

    def __repr__(self) -> str:
        rows = [[f"{one:g}", repr(text)] for one, text in self._rows()]
        return "\n".join([self._title, *text_table(["strength", "text"], rows)])

    def _repr_html_(self) -> str:
        most = max(map(abs, self.strengths)) or 1.0
        rows = [(f"{one:g}", [Cell(text, one / most, prose=True)]) for one, text in self._rows()]
        legend = Legend("0, unsteered", f"{most:g} × the vector", f"-{most:g} ×")
        return as_html(self._title, ["text"], rows, corner="strength", legend=legend)

    def to_pandas(self) -> pd.DataFrame:
        """One row per strength: ``strength``, ``text``."""
        return data_frame(self._rows(), ["strength", "text"])

    def _rows(self) -> list[tuple[float, str]]:
        return list(zip(self.strengths, self.texts, strict=True))

    @property
    def _title(self) -> str:
        return f"{self.model}: {self.prompt!r}, steered at block {self.block}"


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
