"""The logit lens: what each block would say if it were the last one.

(nostalgebraist, 2020.) The state of every block goes through the model's own end: final norm, head,
and whatever the architecture does to the logits. Rather than to rebuild that end for each
architecture, a hook on the last block replaces its output by the states to decode, in a pass over
a single token; so the last block's row is the model's real prediction, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from swarm_notebook.formatting import model_title
from swarm_notebook.probing.grid import Cell, as_html, as_text
from swarm_notebook.probing.subject import Subject, Target, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How many logits are held at once.
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Lens:
    """The top tokens of every block at every position, most probable first.

    Attributes:
        words: the tokens of the text.
        blocks: which blocks were read.
        ids: ``[blocks, positions, top]``.
        probabilities: the same shape.
        predictions: the top words, by block and position.
    """

    model: str
    words: list[str]
    blocks: list[int]
    ids: torch.Tensor
    probabilities: torch.Tensor
    predictions: list[list[list[str]]]

    def __repr__(self) -> str:
        rows = {
            block: [words[0] for words in row]
            for block, row in zip(self.blocks, self.predictions, strict=True)
        }
        return as_text(self._title, self.words, rows)

    def __str__(self) -> str:
        rows = {
            block: [
                f"{words[0]} {100 * chance:.0f}%"
                for words, chance in zip(row, chances[:, 0].tolist(), strict=True)
            ]
            for block, row, chances in self._rows()
        }
        return as_text(self._title, self.words, rows)

    def _repr_html_(self) -> str:
        rows = {
            block: [
                Cell(words[0], chance[0], _hint(words, chance))
                for words, chance in zip(row, chances.tolist(), strict=True)
            ]
            for block, row, chances in self._rows()
        }
        return as_html(self._title, self.words, rows)

    @property
    def _title(self) -> str:
        return f"{self.model}: the next token, as each block would have it"

    def _rows(self) -> Iterable[tuple[int, list[list[str]], torch.Tensor]]:
        return zip(self.blocks, self.predictions, self.probabilities, strict=True)


def logit_lens(
    target: Target,
    text: Text,
    *,
    blocks: Iterable[int] | None = None,
    top: int = 5,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Lens:
    """Decode the states of blocks at every position of a text.

    Args:
        target: a swarm or a model.
        text: one text, or its token ids.
        blocks: None is all.
        top: how many tokens per cell are kept.
        tokenizer: for a model alone; a swarm has its own.
    """
    subject = Subject.of(target, tokenizer)
    chosen, ids = subject.chosen(blocks), subject.ids(text)
    with subject.at_rest() as model, subject.reading(chosen) as states:
        model(input_ids=ids[None].to(model.device), use_cache=False)
    stack = torch.stack([states[block][0, -len(ids) :] for block in chosen])
    probabilities, tokens = _top(subject, stack.flatten(0, 1), top)
    shape = (len(chosen), len(ids), top)
    tokens = tokens.reshape(shape)
    return Lens(
        model_title(subject.name),
        subject.words(ids),
        chosen,
        tokens,
        probabilities.reshape(shape),
        [[subject.words(cell) for cell in row] for row in tokens],
    )


def decode_states(target: Target, states: torch.Tensor) -> torch.Tensor:
    """The logits that the model's own end makes of hidden states ``[count, hidden]``."""
    subject = Subject.of(target)
    with subject.at_rest() as model:
        placed = states.to(model.device, model.dtype)[:, None]
        with subject.editing(len(subject.blocks) - 1, lambda _state: placed):
            # Any token will do: what the blocks make of it is replaced.
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            return model(input_ids=token, use_cache=False).logits[:, 0]


def _top(subject: Subject, states: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = max(1, _LOGITS_AT_ONCE // subject.model.config.get_text_config().vocab_size)
    found: list[Any] = [
        decode_states(subject.model, part).float().softmax(-1).topk(top)
        for part in states.split(rows)
    ]
    chances = torch.cat([part.values for part in found]).cpu()
    return chances, torch.cat([part.indices for part in found]).cpu()


def _hint(words: list[str], chances: list[float]) -> str:
    return "\n".join(
        f"{word!r} {100 * chance:.1f}%" for word, chance in zip(words, chances, strict=True)
    )
