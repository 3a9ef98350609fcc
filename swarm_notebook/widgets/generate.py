"""Watch a model write, see what else it might have written, and take one of those ways.

    GenerateWidget(swarm, "Once upon a time", max_new_tokens=100)     # or %swarm generate --widget

It works in the background: the cell returns at once. The colour of a token says how sure the
model was; its alternatives can be seen and chosen, and the text goes on from there with nothing
computed twice. Every run and every branch is a text of its own; all are kept, and ‹1/2› goes from
one to the other. The same can be done from Python: `run`, `stop`, `resume`, `branch`, `choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import traitlets

from swarm_notebook.errors import Busy
from swarm_notebook.report.formatting import count
from swarm_notebook.widgets.parts.base import action
from swarm_notebook.widgets.parts.static_html import facts, shell, warning
from swarm_notebook.widgets.parts.token_cells import Cell, Cells
from swarm_notebook.widgets.parts.traits import Flag, MaybeWhole, String, Whole
from swarm_notebook.widgets.writing import TOKEN_COLUMNS, WritingWidget, token_rows

if TYPE_CHECKING:
    import pandas as pd

    from swarm_notebook.writing import Draft, Token

_TITLE = 40  # letters of a prompt that name a text


@dataclass(frozen=True, eq=False)
class _Text:
    """One of the texts that were written: its tokens, the prompt, and where it comes from."""

    draft: Draft
    prompt: str
    origin: str


class GenerateWidget(WritingWidget, module="generate"):
    """A prompt, the text that follows, and how sure the model was of each token.

    Args:
        target: a swarm, or a causal LM of transformers.
        prompt: what to begin with.
        chat: wrap the prompt in the tokenizer's chat template.
        tokenizer: for a model alone; a swarm has its own.
        options: sampling, named as in transformers: ``do_sample``, ``temperature``, ``top_p``,
            ``top_k``, ``max_new_tokens``, ``seed``.

    Attributes:
        pages: how many pages of the text there are, see `token_cells`. They are part of the
            widget's state, beside its traits: ``page0``, ``page1``, …
        tail: the cells after them.
        texts: how many texts there are.
        shown: which of them is shown, from 0.
        origin: where it comes from, in a few words.
        beside: which other one is shown next to it, or None.
        aside: the cells of that.
        touched: runs ``[start, end]`` of written tokens in which a server had a part that was
            found wrong since, where answers are audited.
        suspicion: what to say of them.

    Raises:
        ValueError: there is no tokenizer, or an option is out of range.
        TypeError: an option is unknown.
    """

    prompt: String = traitlets.Unicode().tag(sync=True)
    chat: Flag = traitlets.Bool().tag(sync=True)
    pages: Whole = traitlets.Int().tag(sync=True)
    tail: traitlets.List[list[Any]] = traitlets.List().tag(sync=True)
    texts: Whole = traitlets.Int().tag(sync=True)
    shown: Whole = traitlets.Int().tag(sync=True)
    origin: String = traitlets.Unicode().tag(sync=True)
    beside: MaybeWhole = traitlets.Int(None, allow_none=True).tag(sync=True)
    aside: traitlets.List[list[Any]] = traitlets.List().tag(sync=True)
    touched: traitlets.List[list[int]] = traitlets.List().tag(sync=True)
    suspicion: String = traitlets.Unicode().tag(sync=True)

    def __init__(self, target: Any, prompt: str = "", **options: Any) -> None:
        self._cells: Cells | None = None
        self._texts: list[_Text] = []
        self._before_run: _Text | None = None
        super().__init__(target, prompt=prompt, **options)

    @property
    def text(self) -> str:
        """What was written, without the prompt and without special tokens."""
        return self._written

    @property
    def tokens(self) -> list[Token]:
        """The written tokens, each with its probability and alternatives."""
        return list(self.writer.draft.tokens)

    @property
    def cells(self) -> list[Cell]:
        """What the views show, see `token_cells`."""
        with self._updating:
            pages = self._cells.pages[: self.pages] if self._cells is not None else []
            return [cell for page in pages for cell in page] + self.tail

    @action
    def run(self) -> None:
        """Write a new text after the prompt; those that are there stay.

        Raises:
            Busy: a run is going on.
            ValueError: the prompt is empty, or a control is out of range.
        """
        sampling, ids = self.sampling, self._prompt_ids()
        prompt = self.prompt
        title = prompt if len(prompt) <= _TITLE else f"{prompt[: _TITLE - 1]}…"
        with self._updating:
            self._start(lambda: self.writer.write(ids, sampling))
            self._keep(prompt, f"after “{title}”")

    @action
    def resume(self) -> None:
        """Go on where the text ends.

        Raises:
            Busy: a run is going on.
            ValueError: there is no text yet.
        """
        sampling = self.sampling
        self._start(lambda: self.writer.resume(sampling))

    @action
    def branch(self, position: int, token: int | str) -> None:
        """Write a new text: this one up to a token, something else in its place, and on from there.

        Args:
            position: of the written tokens, from 0.
            token: an id, or a text of any length.

        Raises:
            Busy: a run is going on.
            IndexError: there is no such position.
            ValueError: the token is not in the vocabulary, or the text is empty.
        """
        sampling, ids = self.sampling, self._ids_of(token)
        with self._updating:
            self._start(lambda: self.writer.branch(position, ids, sampling))
            self._keep_branch(position)

    @action
    def edit(self, position: int, token: int | str) -> None:
        """As `branch`, but write nothing yet; see `resume`."""
        ids = self._ids_of(token)
        with self._updating:
            self.writer.edit(position, ids)
            self._keep_branch(position)

    @action
    def choose(self, text: int) -> None:
        """Turn to one of the texts, from 0; Continue and branches go on with that one.

        Raises:
            Busy: a run is going on.
            IndexError: there is no such text.
        """
        with self._updating:
            self.writer.open(self._text(text).draft)
            self._turn_to(text)

    @action
    def compare(self, text: int | None) -> None:
        """Show another of the texts beside this one, or none.

        Raises:
            IndexError: there is no such text.
        """
        aside: list[Cell] = []
        if text is not None:
            draft, cells = self._text(text).draft, Cells(self._vocabulary)
            cells.cut(draft.prompt, draft.tokens)
            cells.grow(list(draft.tokens))
            aside = [cell for page in [*cells.pages, cells.tail] for cell in page]
        self.update(beside=text, aside=aside)

    def to_pandas(self) -> pd.DataFrame:
        """The written tokens, one a row.

        Columns: ``position``, ``id``, ``text``, ``probability`` (None for what a person put
        there) and ``alternatives`` (pairs of text and probability, best first).
        """
        from swarm_notebook.report.formatting import data_frame

        return data_frame(token_rows(self._vocabulary, self.writer.draft), TOKEN_COLUMNS)

    def to_markdown(self) -> str:
        """The prompt as a quotation, and the text."""
        prompt = self._shown_prompt()
        quoted = "\n".join(f"> {line}".rstrip() for line in prompt.splitlines())
        return f"{quoted}\n\n{self.text}\n"

    def summary(self) -> str:
        return f"{self.title}, {count(len(self.writer.draft.tokens), 'token')} written"

    def picture(self) -> str:
        """The text in its colours."""
        body = "".join(
            f'<span style="--u:{0 if cell[1] is None else 1 - cell[1]:.2f}" '
            f'title="{"" if cell[1] is None else f"{cell[1]:.1%}"}">{escape(cell[0])}</span>'
            for cell in self.cells
            if not cell[2]
        )
        return shell(
            f'<div class="snw-title">{escape(self.title)}</div>'
            f'<div class="snw-prompt">{escape(self._shown_prompt())}</div>'
            f'<div class="snw-text" dir="auto">{body}</div>{warning(self.suspicion)}'
            f'<div class="snw-dim">{escape(facts(self.note, self.stats))}</div>'
        )

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """As every widget's; the whole state has the pages as well."""
        with self._updating:
            state: dict[str, Any] = super().get_state(key, drop_defaults)
            return state if key is not None else state | self._named(range(self.pages))

    def _shown_prompt(self) -> str:
        return self._texts[self.shown].prompt if self._texts else self.prompt

    def _text(self, number: int) -> _Text:
        if not 0 <= number < len(self._texts):
            raise IndexError(f"text: {number} is not one of {len(self._texts)} texts")
        return self._texts[number]

    def _keep(self, prompt: str, origin: str) -> None:
        """The writer has begun another text; one without any token is not worth a number."""
        self._before_run = self._texts[self.shown] if self._texts else None
        self._texts = [one for one in self._texts if one.draft.tokens]
        self._texts.append(_Text(self.writer.draft, prompt, origin))
        self._turn_to(len(self._texts) - 1)

    def _keep_branch(self, position: int) -> None:
        number = self.shown + 1
        self._keep(self._shown_prompt(), f"branched from text {number} at token {position + 1}")

    def _turn_to(self, number: int) -> None:
        one = self._texts[number]
        self.update(texts=len(self._texts), shown=number, origin=one.origin, **self._suspect())
        if self.beside is not None and (self.beside == number or self.beside >= self.texts):
            self.update(beside=None, aside=[])

    def beat(self) -> None:
        """As every widget's; a server that was found wrong meanwhile is told."""
        super().beat()
        with self._updating:
            self.update(**self._suspect())

    def _suspect(self) -> dict[str, Any]:
        """The traits that say which tokens may be wrong."""
        runs, said = self._suspicion(
            self.writer.draft, "this text may be wrong; Run generates it again on other servers."
        )
        return {"touched": [list(run) for run in runs], "suspicion": said}

    def _back_to_text(self) -> None:
        """A run has ended without a token: what was there before is shown again."""
        before = self._before_run
        if self.writer.draft.tokens or before is None or not before.draft.tokens:
            return
        with suppress(Busy):  # another run has begun meanwhile
            self.writer.open(before.draft)
            self._texts = [one for one in self._texts if one.draft.tokens]
            self._turn_to(self._texts.index(before))

    def _show_text(self, values: dict[str, Any], *, ended: bool) -> float | None:
        if ended:
            self._back_to_text()
        if self._cells is None:
            self._cells = Cells(self._vocabulary)
        cells, draft = self._cells, self.writer.draft
        prompt, tokens, before = draft.prompt, list(draft.tokens), self.pages
        if cells.cut(prompt, tokens):
            self.update(pages=len(cells.pages), tail=list(cells.tail))
        kept = len(cells.pages)
        cells.grow(tokens)
        # The views count these pages when they have them, or no longer: then they are emptied.
        changed = range(kept, max(before, len(cells.pages)))
        if changed:
            self._send({"method": "update", "state": self._named(changed), "buffer_paths": []})
        values |= {"pages": len(cells.pages), "tail": list(cells.tail), **self._suspect()}
        return None

    def _named(self, numbers: range) -> dict[str, list[Cell]]:
        """Pages as a part of the state; one that is no more is empty."""
        pages = list(self._cells.pages) if self._cells is not None else []
        return {f"page{at}": pages[at] if at < len(pages) else [] for at in numbers}

    def _estimate_traits(self) -> list[str]:
        return ["prompt", "chat", "max_new_tokens"]

    def _prompt_ids(self) -> Sequence[int]:
        if not self.prompt:
            return []
        if self.chat and self.has_template:
            return self._ids_of_chat([{"role": "user", "content": self.prompt}])
        return list(self._tokenizer(self.prompt)["input_ids"])

    def _ids_of(self, token: int | str) -> list[int]:
        if isinstance(token, str):
            ids = list(self._tokenizer.encode(token, add_special_tokens=False))
            if not ids:
                raise ValueError(f"token: {token!r} has no tokens")
            return ids
        size = self._model.config.get_text_config().vocab_size
        if not 0 <= token < size:
            raise ValueError(f"token: {token} is not in the vocabulary of {size} tokens")
        return [token]
