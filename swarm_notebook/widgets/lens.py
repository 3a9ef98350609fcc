"""The logit lens as a heat map: next-token prediction per block, at every token of a text.

    lens = LensWidget(swarm, "The capital of France is")     # or %swarm lens "…"
    lens                                       # click a cell, or choose one with arrows and Enter
    lens.hidden_state                          # that block's output at that token, a tensor

The text goes through the swarm once, when the widget is made. Ranks of a chosen token are computed
here, from the states that are kept, on a thread and a view of the model of their own: a cell that
runs meanwhile does not notice.

The numbers travel as bytes, row by row (last block last), in the machine order of all browsers.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
import traitlets

from swarm_notebook.model.home import Blocks
from swarm_notebook.probing.grid import visible
from swarm_notebook.probing.lens import Lens, logit_lens, token_ranks
from swarm_notebook.probing.subject import Subject, Target, Text
from swarm_notebook.report.formatting import count
from swarm_notebook.swarm import Swarm
from swarm_notebook.widgets.parts.base import Widget, action
from swarm_notebook.widgets.parts.traits import Blob, Flag, String, Whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAST = 128


class LensWidget(Widget, module="lens"):
    """Tokens by blocks; the colour is the top token's probability, the entropy, or a token's rank.

    Args:
        target: a swarm or a model.
        text: one text, or its token ids.
        blocks: which ones; None is all.
        token: the token whose rank can be shown, as text or id; it can be changed in the view.
        last: how many tokens at the end of the text are shown; all are read.
        tokenizer: for a model alone; a swarm has its own.

    Attributes:
        lens: all that is shown, as a `Lens`.
        colour: ``"probability"``, ``"entropy"`` or ``"rank"``.
        selected: the chosen cell, ``[block, position in the text]``, or empty.

    Raises:
        BlocksOutOfRange: the model does not have a block.
        ValueError: there is nothing to read, or ``token`` is not one token.
    """

    title: String = traitlets.Unicode().tag(sync=True)
    words: traitlets.List[str] = traitlets.List(traitlets.Unicode()).tag(sync=True)
    first: Whole = traitlets.Int().tag(sync=True)
    blocks: traitlets.List[int] = traitlets.List(traitlets.Int()).tag(sync=True)
    vocabulary: traitlets.List[str] = traitlets.List(
        traitlets.Unicode(), help="what `tops` numbers"
    ).tag(sync=True)
    vocabulary_size: Whole = traitlets.Int(help="how many tokens the model has").tag(sync=True)
    top: Whole = traitlets.Int(help="tokens kept per cell").tag(sync=True)
    tops: Blob = traitlets.Bytes(help="uint32 [blocks, words, top]").tag(sync=True)
    chances: Blob = traitlets.Bytes(help="float32 [blocks, words, top]").tag(sync=True)
    entropy: Blob = traitlets.Bytes(help="float32 [blocks, words], in bits").tag(sync=True)
    token: String = traitlets.Unicode(help="the word that is ranked").tag(sync=True)
    ranks: Blob = traitlets.Bytes(help="uint32 [blocks, words], 1 is the top; or empty").tag(
        sync=True
    )
    ranking: Flag = traitlets.Bool(help="ranks are being computed").tag(sync=True)
    colour: traitlets.Enum[str] = traitlets.Enum(
        ["probability", "entropy", "rank"], "probability"
    ).tag(sync=True)
    selected: traitlets.List[int] = traitlets.List(traitlets.Int()).tag(sync=True)

    def __init__(
        self,
        target: Target,
        text: Text,
        *,
        blocks: Blocks | None = None,
        token: str | int | None = None,
        last: int = LAST,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **traits: Any,
    ) -> None:
        subject = Subject.of(target, tokenizer)
        wanted = None if token is None else _one_token(subject, token)
        lens = logit_lens(target, text, blocks=blocks, last=last, tokenizer=tokenizer)
        self.lens = lens
        self._swarm = target if isinstance(target, Swarm) else None
        self._subject = subject.twin()
        self._wanted = wanted
        self._computing = threading.Lock()
        vocabulary: dict[int, int] = {}
        numbers = [
            vocabulary.setdefault(id_, len(vocabulary)) for id_ in lens.ids.flatten().tolist()
        ]
        super().__init__(
            title=lens.model,
            words=[visible(word) for word in lens.words],
            first=lens.first,
            blocks=lens.blocks,
            vocabulary=[visible(word) for word in subject.words(vocabulary)],
            vocabulary_size=subject.model.config.get_text_config().vocab_size,
            top=lens.ids.shape[-1],
            tops=_bytes(torch.tensor(numbers), torch.int32),
            chances=_bytes(lens.probabilities, torch.float32),
            entropy=_bytes(lens.entropy, torch.float32),
            **traits,
        )
        self._ids = list(vocabulary)
        if wanted is not None:
            self._rank(wanted)

    @property
    def hidden_state(self) -> torch.Tensor:
        """The selected block's output at the selected token, ``[hidden]``.

        Raises:
            LookupError: no cell is selected.
        """
        if len(self.selected) != 2:
            raise LookupError("no cell is selected: click one, or set selected = [block, position]")
        block, position = self.selected
        return self.lens.states[self.lens.blocks.index(block), position - self.lens.first]

    @action
    def rank(self, token: str) -> None:
        """Show the ranks of a word that is one token for this model; with or without the space."""
        self._rank_soon(_one_token(self._subject, token))

    @action
    def rank_number(self, number: int) -> None:
        """Show the ranks of one of the words in the view: its place in `vocabulary`."""
        if not 0 <= number < len(self._ids):
            raise ValueError(f"number: {number} is not in the vocabulary of {len(self._ids)} words")
        self._rank_soon(self._ids[number])

    def summary(self) -> str:
        return f"{self.title}, {len(self.blocks)} blocks x {count(len(self.words), 'token')}"

    def picture(self) -> str:
        return self.lens._repr_html_()

    @traitlets.validate("selected")
    def _check_selected(self, proposal: Any) -> list[int]:
        value = list(proposal["value"])
        if not value:
            return value
        inside = len(value) == 2 and value[0] in self.blocks
        if not inside or not 0 <= value[1] - self.first < len(self.words):
            raise traitlets.TraitError(
                f"selected: {value} is not a cell; [block, position] with a position from "
                f"{self.first} to {self.first + len(self.words) - 1}"
            )
        return value

    def _rank_soon(self, token: int) -> None:
        with self._updating:
            self._wanted = token
            self.update(ranking=True)
        threading.Thread(target=self._rank, args=(token,), daemon=True).start()

    def _rank(self, token: int) -> None:
        with self._computing, self.showing_errors():
            if token != self._wanted:
                return  # another one has been asked for meanwhile
            ranks = token_ranks(self._subject.model, self.lens.states, token)
            self.update(
                token=visible(self._subject.words([token])[0]),
                ranks=_bytes(ranks, torch.int32),
                colour="rank",
            )
        with self._updating:  # else a token that is asked for just now would not be waited for
            self.update(ranking=token != self._wanted)


def _one_token(subject: Subject, token: str | int) -> int:
    """The id of a word that is one token, as it stands or after a space."""
    if isinstance(token, int):
        size = subject.model.config.get_text_config().vocab_size
        if not 0 <= token < size:
            raise ValueError(f"token: {token} is not in the vocabulary of {size} tokens")
        return token
    tokenizer: Any = subject.tokenizer
    if tokenizer is None:
        raise ValueError("token: a word needs a tokenizer; give the token's id")
    word = token.replace("·", " ")
    exact, spaced = (
        tokenizer(spelling, add_special_tokens=False)["input_ids"]
        for spelling in (word, f" {word}")
    )
    for ids in (exact, spaced):
        if len(ids) == 1:
            return int(ids[0])
    parts = " ".join(visible(part) for part in subject.words(exact[:10]))
    raise ValueError(f"token: ranking needs a single token; {token!r} is {len(exact)} ({parts})")


def _bytes(values: torch.Tensor, dtype: torch.dtype) -> bytes:
    return values.to(dtype).contiguous().numpy().tobytes()


__all__ = ["Lens", "LensWidget"]
