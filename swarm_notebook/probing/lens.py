"""The logit lens: what each block would say if it were the last one.

(nostalgebraist, 2020.) The state of every block goes through the model's own end: final norm, head,
and whatever the architecture does to the logits. Rather than to rebuild that end for each
architecture, a hook on the last block replaces its output by the states to decode, in a pass over
a single token; so the last block's row is the model's real prediction, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from swarm_notebook.model.home import Blocks
from swarm_notebook.probing.grid import Cell, Legend, as_html, as_text, by_block, visible
from swarm_notebook.probing.subject import Subject, Target, Text
from swarm_notebook.progress import Waiting
from swarm_notebook.report.formatting import model_title

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How many logits are held at once: 128 MB in float32.
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Lens:
    """The top tokens of every block at every position, most probable first.

    Attributes:
        words: the tokens of the text, or the last ones of them.
        first: the position in the text of the first of these words.
        blocks: which blocks were read.
        ids: ``[blocks, positions, top]``.
        probabilities: the same shape.
        entropy: of each cell's whole distribution, in bits, ``[blocks, positions]``.
        states: what was decoded: the blocks' outputs, ``[blocks, positions, hidden]``.
        predictions: the top words, by block and position.
    """

    model: str
    words: list[str]
    first: int
    blocks: list[int]
    ids: torch.Tensor
    probabilities: torch.Tensor
    entropy: torch.Tensor
    states: torch.Tensor
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
                Cell(visible(words[0]), chance[0], _hint(words, chance))
                for words, chance in zip(row, chances.tolist(), strict=True)
            ]
            for block, row, chances in self._rows()
        }
        head = [visible(word) for word in self.words]
        legend = Legend("0%", "100% probability of the token shown")
        return as_html(self._title, head, by_block(rows), legend=legend)

    @property
    def _title(self) -> str:
        return f"{self.model}: next-token prediction per block"

    def _rows(self) -> Iterable[tuple[int, list[list[str]], torch.Tensor]]:
        return zip(self.blocks, self.predictions, self.probabilities, strict=True)


def logit_lens(
    target: Target,
    text: Text,
    *,
    blocks: Blocks | None = None,
    top: int = 5,
    last: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Lens:
    """Decode the states of blocks at every position of a text.

    Args:
        target: a swarm or a model.
        text: one text, or its token ids.
        blocks: a block, a list, a range or a slice; None is all.
        top: how many tokens per cell are kept.
        last: decode this many tokens at the end of the text; None is all.
        tokenizer: for a model alone; a swarm has its own.
    """
    subject = Subject.of(target, tokenizer)
    chosen, ids = subject.chosen(blocks), subject.ids(text)
    with subject.at_rest() as model, subject.reading(chosen) as states:
        model(input_ids=ids[None].to(model.device), use_cache=False)
    shown = ids if last is None else ids[-last:]
    stack = torch.stack([states[block][0, -len(shown) :] for block in chosen])

    def measure(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        chances = logits.softmax(-1)
        best = chances.topk(top)
        return best.values, best.indices, torch.special.entr(chances).sum(-1) / math.log(2)

    probabilities, tokens, entropy = _measured(subject, stack, measure)
    return Lens(
        model_title(subject.name),
        subject.words(shown),
        len(ids) - len(shown),
        chosen,
        tokens,
        probabilities,
        entropy,
        stack.cpu(),
        [[subject.words(cell) for cell in row] for row in tokens],
    )


def token_ranks(target: Target, states: torch.Tensor, token: int) -> torch.Tensor:
    """Which place a token has among all, 1 for the most probable, if these states were the last.

    Args:
        target: a swarm or a model.
        states: ``[..., hidden]``, such as those of a `Lens`.
        token: its id.

    Returns:
        Whole numbers ``[...]``.
    """
    subject = Subject.of(target)

    def measure(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((logits > logits[:, token, None]).sum(-1) + 1,)

    (ranks,) = _measured(subject, states, measure)
    return ranks


def decode_states(target: Target, states: torch.Tensor) -> torch.Tensor:
    """The logits that the model's own end makes of hidden states ``[count, hidden]``."""
    subject = Subject.of(target)
    with subject.at_rest() as model:
        placed = states.to(model.device, model.dtype)[:, None]
        with subject.editing(len(subject.blocks) - 1, lambda _state: placed):
            # Any token will do: what the blocks make of it is replaced.
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            return model(input_ids=token, use_cache=False).logits[:, 0]


def _measured(
    subject: Subject,
    states: torch.Tensor,
    measure: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
) -> list[torch.Tensor]:
    """What `measure` makes of the logits of ``states``, a part at a time, in the states' shape."""
    rows = max(1, _LOGITS_AT_ONCE // subject.model.config.get_text_config().vocab_size)
    parts = states.flatten(0, -2).split(rows)
    found: list[list[torch.Tensor]] = []
    with Waiting("Decoding states", total=len(parts), unit="parts", count=lambda: len(found)):
        for part in parts:
            logits = decode_states(subject.model, part).float()
            found.append([values.cpu() for values in measure(logits)])
    joined = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return [values.reshape(*states.shape[:-1], *values.shape[1:]) for values in joined]


def _hint(words: list[str], chances: list[float]) -> str:
    return "\n".join(
        f"{word!r} {100 * chance:.1f}%" for word, chance in zip(words, chances, strict=True)
    )
