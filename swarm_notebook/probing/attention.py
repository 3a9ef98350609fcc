"""Attention patterns: which tokens each head of a block looks at.

Fused attention never has the weights in memory, so the model runs once with transformers' plain
implementation ("eager"), which returns them. They come from inside of the block, so the block must
be at home (``swarm.own(block)``), or the model local.

    patterns = attention_patterns(swarm, text, blocks=23)     # after swarm.own(23)
    patterns                  # where each head looks from the last token
    patterns.head(23, 3)      # one head, from every token
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from swarm_notebook.errors import Unsupported
from swarm_notebook.model.home import Blocks
from swarm_notebook.probing.grid import Cell, Legend, as_html, visible
from swarm_notebook.probing.subject import Subject, Target, Text
from swarm_notebook.report.formatting import data_frame, model_title, text_table

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn
    from transformers import PreTrainedTokenizerBase

LEGEND = Legend("attention weight 0", "1")
# Below this a cell stays empty: a grid in which every cell has digits shows nothing.
_SHOWN = 0.1


@dataclass(frozen=True)
class HeadPattern:
    """Where one head looks: a row for each token that looks, a column for each looked at.

    Attributes:
        weights: ``[tokens, tokens]``; each row sums to 1 (to less, where a head has a sink).
    """

    model: str
    words: list[str]
    block: int
    number: int
    weights: torch.Tensor

    def __repr__(self) -> str:
        rows = [
            [visible(word), *("" if value < _SHOWN else f"{value:.1f}" for value in row)]
            for word, row in self._rows()
        ]
        return "\n".join([self._title, *text_table(["from", *map(visible, self.words)], rows)])

    def _repr_html_(self) -> str:
        rows = [(visible(word), self._cells(word, row)) for word, row in self._rows()]
        head = [visible(word) for word in self.words]
        return as_html(self._title, head, rows, corner="from", legend=LEGEND)

    def _rows(self) -> list[tuple[str, list[float]]]:
        return list(zip(self.words, self.weights.tolist(), strict=True))

    def _cells(self, word: str, row: list[float]) -> list[Cell]:
        return [
            _cell(value, f"{word!r} at {other!r}")
            for value, other in zip(row, self.words, strict=True)
        ]

    @property
    def _title(self) -> str:
        return f"{self.model}: attention of block {self.block}, head {self.number}"


@dataclass(frozen=True)
class AttentionPatterns:
    """Where the heads of some blocks look; shown from the last token, a row for each head.

    Attributes:
        words: the text's tokens.
        blocks: what was read.
        weights: ``[blocks, heads, tokens, tokens]``, the last but one is the token that looks.
    """

    model: str
    words: list[str]
    blocks: list[int]
    weights: torch.Tensor

    def head(self, block: int, number: int) -> HeadPattern:
        """One head, from every token.

        Raises:
            LookupError: the block was not read, or it has no such head.
        """
        heads = self.weights.shape[1]
        if block not in self.blocks or not 0 <= number < heads:
            raise LookupError(
                f"block {block}, head {number}: not in these patterns, which have blocks "
                f"{self.blocks} with {heads} heads each"
            )
        weights = self.weights[self.blocks.index(block), number]
        return HeadPattern(self.model, self.words, block, number, weights)

    def __repr__(self) -> str:
        rows = []
        for name, row in self._rows():
            best = torch.tensor(row).topk(min(3, len(row)))
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            said = [f"{visible(self.words[at])} {value:.2f}" for value, at in pairs]
            rows.append([name, *said])
        head = ["head", "attends most to", "then", "then"][: 1 + min(3, len(self.words))]
        return "\n".join([self._title, *text_table(head, rows)])

    def _repr_html_(self) -> str:
        rows = [
            (
                name,
                [
                    _cell(value, f"{name}: {word!r}")
                    for value, word in zip(row, self.words, strict=True)
                ],
            )
            for name, row in self._rows()
        ]
        head = [visible(word) for word in self.words]
        return as_html(self._title, head, rows, corner="head", legend=LEGEND)

    def to_pandas(self) -> pd.DataFrame:
        """One row per block, head and pair of tokens of which the first may look at the second."""
        rows = [
            (block, head, looking, at, self.words[at], float(self.weights[row, head, looking, at]))
            for row, block in enumerate(self.blocks)
            for head in range(self.weights.shape[1])
            for looking in range(len(self.words))
            for at in range(looking + 1)
        ]
        return data_frame(rows, ["block", "head", "from", "to", "word", "weight"])

    def _rows(self) -> Iterator[tuple[str, list[float]]]:
        """The last block first, as blocks are drawn."""
        for row in reversed(range(len(self.blocks))):
            for head, values in enumerate(self.weights[row, :, -1].tolist()):
                yield f"{self.blocks[row]}.{head}", values

    @property
    def _title(self) -> str:
        return f"{self.model}: attention of each head from {visible(self.words[-1])!r}"


def attention_patterns(
    target: Target,
    text: Text,
    *,
    blocks: Blocks | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> AttentionPatterns:
    """The attention weights of some blocks for one text.

    Args:
        target: a swarm or a model.
        text: a text, or its token ids.
        blocks: a block, a list, a range or a slice, at home; None is all.
        tokenizer: for a model alone; a swarm has its own.

    Raises:
        Unsupported: a block runs on a server (the message says how to bring it home), or the
            family gives no attention weights.
    """
    subject = Subject.of(target, tokenizer)
    chosen, ids = subject.chosen(blocks), subject.ids(text)
    found: dict[int, torch.Tensor] = {}
    with subject.at_rest() as model, ExitStack() as changes:
        for block in chosen:
            changes.enter_context(_reading(subject, block, found))
        changes.enter_context(_plainly(model))
        model(input_ids=ids[None].to(model.device), use_cache=False)
    for block in chosen:
        if block not in found:
            raise Unsupported(
                f"block {block} runs on a server, which returns no attention weights; bring it "
                f"home: swarm.own({block})"
            )
    return AttentionPatterns(
        model_title(subject.name),
        subject.words(ids),
        chosen,
        torch.stack([found[block] for block in chosen]),
    )


@contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """The model with transformers' plain attention; as it was afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _reading(subject: Subject, block: int, found: dict[int, torch.Tensor]) -> Iterator[None]:
    module = subject.attention(block)
    if module is None:
        raise Unsupported(f"no module of block {block} of {subject.name} is known to attend")

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        weights = output[1]
        if weights is None:
            raise Unsupported(f"{subject.name} does not return the weights of its attention")
        found[block] = weights[0].detach().float().cpu()

    with module.register_forward_hook(keep):
        yield


def _cell(value: float, hint: str) -> Cell:
    return Cell(f"{value:.2f}" if value >= _SHOWN else "", value, f"{hint}: {value:.4f}")
