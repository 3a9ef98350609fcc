"""Activation patching: which block, at which position, carries what makes the difference.

(Vig et al., 2020; Meng et al., 2022.) Two texts of equal length differ in one fact. The corrupted
one is run again and again, each time with the state of one block at one position taken from the
clean run, and a metric says how much of the clean behaviour came back: 0 as corrupted, 1 as clean.

All positions of one block are the rows of one batch, so a remote model is asked twice per block.
Before the first token that differs nothing can be restored: in a causal model both runs have the
same states there, and these positions are left out unless they are asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

from swarm_notebook.model.home import Blocks
from swarm_notebook.probing.grid import DASH, Cell, Legend, as_html, visible
from swarm_notebook.probing.subject import Subject, Target, Text
from swarm_notebook.progress import Waiting
from swarm_notebook.report.formatting import data_frame, model_title, text_table

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

Metric: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


LEGEND = Legend("0, like the corrupted run", "1, like the clean run", "-1, the opposite")


@dataclass(frozen=True, repr=False)
class Restored(ABC):
    """What the results of all kinds of patching have: the metric of runs between two others.

    Attributes:
        scores: the metric of each patched run; NaN where there was none.
        clean, corrupted: the metric of the two runs without a patch.
    """

    model: str
    scores: torch.Tensor
    clean: float
    corrupted: float
    _patch: ClassVar[str]
    _corner: ClassVar[str] = "block"
    _absent: ClassVar[str] = "not patched"

    @property
    def restored(self) -> torch.Tensor:
        """`scores` on a scale where the corrupted run is 0 and the clean run is 1."""
        return (self.scores - self.corrupted) / (self.clean - self.corrupted)

    def __repr__(self) -> str:
        rows = [[str(name), *(_text(value, 1) for value in row)] for name, row in self._drawn()]
        return "\n".join([self._title, *text_table([self._corner, *self._names], rows)])

    def _repr_html_(self) -> str:
        rows = [
            (name, [_cell(value, self._hint(name, at)) for at, value in enumerate(row)])
            for name, row in self._drawn()
        ]
        absent = self._absent if self.scores.isnan().any() else ""
        legend = replace(LEGEND, absent=absent)
        return as_html(self._title, self._names, rows, corner=self._corner, legend=legend)

    def to_pandas(self) -> pd.DataFrame:
        """One row per patched run: its place, the metric, and how much was restored."""
        restored = self.restored
        rows = [
            self._place(row, at)
            | {"score": float(self.scores[row, at]), "restored": float(restored[row, at])}
            for row, at in product(*map(range, self.scores.shape))
            if not math.isnan(float(self.scores[row, at]))
        ]
        return data_frame(rows, [*self._place(0, 0), "score", "restored"])

    def _drawn(self) -> list[tuple[Any, list[float]]]:
        """The last row first, as blocks are drawn."""
        return list(zip(self._lines, self.restored.tolist(), strict=True))[::-1]

    @property
    def _title(self) -> str:
        return f"{self.model}: share of the clean run restored by each {self._patch}"

    @property
    @abstractmethod
    def _lines(self) -> Sequence[int | str]:
        """What the rows of `scores` are."""

    @property
    @abstractmethod
    def _names(self) -> Sequence[str]:
        """What its columns are."""

    @abstractmethod
    def _hint(self, line: int | str, at: int) -> str:
        """What a cell's patch is called."""

    @abstractmethod
    def _place(self, row: int, at: int) -> dict[str, Any]:
        """Where a patch was, as columns of a data frame."""


def _text(value: float, digits: int) -> str:
    """A share for people: nothing where nothing was patched (NaN), and no negative zero."""
    if math.isnan(value):
        return ""
    text = f"{value:.{digits}f}"
    return text if float(text) else text.removeprefix("-")


def _cell(value: float, hint: str) -> Cell:
    """A share as a cell. Where nothing happens it stays empty: what does is seen at once."""
    if math.isnan(value):
        return Cell(DASH, 0.0)
    return Cell(_text(value, 2) if abs(value) >= 0.05 else "", value, f"{hint}{value:.4f}")


@dataclass(frozen=True, repr=False)
class Patching(Restored):
    """What restoring the clean state does to the metric; scores are ``[blocks, positions]``.

    Attributes:
        words: the corrupted text's tokens at the patched positions.
        blocks, positions: what was patched.
    """

    words: list[str]
    blocks: list[int]
    positions: list[int]

    _patch: ClassVar[str] = "patch"

    @property
    def _lines(self) -> list[int]:
        return self.blocks

    @property
    def _names(self) -> list[str]:
        return [visible(word) for word in self.words]

    def _hint(self, line: int | str, at: int) -> str:
        return f"{self.words[at]!r} "

    def _place(self, row: int, at: int) -> dict[str, Any]:
        position, token = self.positions[at], self.words[at]
        return {"block": self.blocks[row], "position": position, "token": token}


def patch(
    target: Target,
    clean: Text,
    corrupted: Text,
    metric: Metric,
    *,
    blocks: Blocks | None = None,
    positions: Iterable[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Patching:
    """Restore the clean state at each block and position of the corrupted run.

    Args:
        target: a swarm or a model.
        clean: a text, or its token ids.
        corrupted: another one of as many tokens.
        metric: gets the logits of the last position, ``[rows, vocabulary]``, and returns a number
            for each row, such as the difference of two tokens' logits.
        blocks: a block, a list, a range or a slice; None is all.
        positions: None is all from the first token that differs; negative ones count from the end.
        tokenizer: for a model alone; a swarm has its own.

    Raises:
        ValueError: the texts have different lengths, a position is outside of them, or the metric
            is the same for both.
    """
    subject = Subject.of(target, tokenizer)
    chosen, good, bad = subject.chosen(blocks), subject.ids(clean), subject.ids(corrupted)
    places = places_of(positions, subject, good, bad)
    with subject.at_rest():
        with subject.reading(chosen) as read:
            # The clean run is the last of the two, and so the one whose states are kept.
            both = scores_of_both(subject, good, bad, metric)
            states = {block: state[0] for block, state in read.items()}
        rows = bad.expand(len(places), -1)
        from_end = [place - len(bad) for place in places]
        scores: list[list[float]] = []
        with Waiting("Patching", total=len(chosen), unit="blocks", count=lambda: len(scores)):
            for block in chosen:
                with subject.editing(block, _restoring(states[block], from_end)):
                    scores.append(run_metric(subject, rows, metric))
    words, title = subject.words(bad[places]), model_title(subject.name)
    return Patching(title, torch.tensor(scores), *both, words, chosen, places)


def places_of(
    positions: Iterable[int] | None, subject: Subject, clean: torch.Tensor, corrupted: torch.Tensor
) -> list[int]:
    """Which positions are patched, from 0; None is all from the first token that differs.

    Raises:
        ValueError: the texts differ in length, or a position is outside of them.
    """
    length = len(corrupted)
    if len(clean) != length:
        raise ValueError(
            f"clean has {len(clean)} tokens {subject.words(clean)}, corrupted has {length} "
            f"{subject.words(corrupted)}; patching needs texts of equal length"
        )
    if positions is None:
        differ = (clean != corrupted).nonzero().flatten().tolist()
        positions = range(differ[0] if differ else 0, length)
    places = list(positions)
    for place in places:
        if not -length <= place < length:
            raise ValueError(f"positions: {place} is outside of a text of {length} tokens")
    return [place % length for place in places]


def _restoring(state: torch.Tensor, places: list[int]) -> Any:
    """Row by row the clean state at another position."""

    def edit(corrupted: torch.Tensor) -> torch.Tensor:
        mended = corrupted.clone()
        for row, place in enumerate(places):
            mended[row, place] = state[place]
        return mended

    return edit


def scores_of_both(
    subject: Subject, clean: torch.Tensor, corrupted: torch.Tensor, metric: Metric
) -> tuple[float, float]:
    """The metric of both runs without a patch.

    Raises:
        ValueError: it is the same.
    """
    (corrupt,) = run_metric(subject, corrupted[None], metric)
    (good,) = run_metric(subject, clean[None], metric)
    if good == corrupt:
        raise ValueError(
            f"metric: {good:.3g} for the clean and for the corrupted text, so there is nothing to "
            "restore"
        )
    return good, corrupt


def run_metric(subject: Subject, ids: torch.Tensor, metric: Metric) -> list[float]:
    """The metric of each row of ``[rows, tokens]``."""
    logits = subject.model(input_ids=ids.to(subject.model.device), use_cache=False).logits[:, -1]
    scores = metric(logits.float())
    if scores.shape != (len(ids),):
        raise ValueError(
            f"metric: returned shape {list(scores.shape)} for logits {list(logits.shape)}; one "
            f"number per row is needed: [{len(ids)}]"
        )
    return scores.tolist()
