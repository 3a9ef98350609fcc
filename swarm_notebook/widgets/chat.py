"""Talk with a model, in the form that it was trained on.

    chat = ChatWidget(swarm)               # or %swarm chat
    chat.messages                          # [{"role": "user", "content": …}, …]

It works in the background: the cell returns at once. Nothing that was said is lost: an edited
turn, another answer, a conversation that is begun anew are branches beside what was, and `choose`
(or ‹1/2› in the view) goes from one to the other. The model is asked with its chat template each
time, but reads only what it has not read before: the conversation's keys and values are kept, and
cut back as far as needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import traitlets

from swarm_notebook.errors import Busy
from swarm_notebook.report.formatting import count
from swarm_notebook.widgets.parts import markdown
from swarm_notebook.widgets.parts.base import action
from swarm_notebook.widgets.parts.conversation import Conversation, Message, Turn
from swarm_notebook.widgets.parts.static_html import facts, shell, warning
from swarm_notebook.widgets.parts.traits import Flag, String
from swarm_notebook.widgets.writing import TOKEN_COLUMNS, WritingWidget, token_rows

if TYPE_CHECKING:
    import pandas as pd

ROLES = ("system", "user", "assistant")
# A long answer takes longer to render: it may take this part of the time.
_RENDERING = 0.15
NAMES = {"system": "Instructions", "user": "You", "assistant": "Model"}


class ChatWidget(WritingWidget, module="chat"):
    """A conversation.

    Args:
        target: a swarm, or a causal LM of transformers.
        messages: what has been said before, as `messages`.
        system: instructions to begin with.
        tokenizer: for a model alone; a swarm has its own.
        options: sampling, named as in transformers: ``do_sample``, ``temperature``, ``top_p``,
            ``top_k``, ``max_new_tokens``, ``seed``.

    Attributes:
        turns: what is shown: ``role``, ``text``, for the model's ``html`` and whether it was
            ``edited``, ``branch`` (which of how many, from 0), ``beside`` if another branch
            is shown next to it, with what was said ``after`` it, and ``suspicion`` if a server had
            a part in it that was found wrong since, where answers are audited.
        live: the HTML of the answer that is being written.
        typed: what stands in the box for the next message.
        edits: those begun in the view and not sent: ``turn``, ``of`` (its text), ``text``.
        can_restore: whether `restore` brings something back.

    Raises:
        ValueError: the tokenizer has no chat template, or a message has another form.
        TypeError: an option is unknown.
    """

    GO_ON = "connect again (%swarm connect); ChatWidget(swarm, chat.messages) restores the chat"

    turns: traitlets.List[dict[str, Any]] = traitlets.List().tag(sync=True)
    live: String = traitlets.Unicode().tag(sync=True)
    typed: String = traitlets.Unicode().tag(sync=True)
    edits: traitlets.List[dict[str, Any]] = traitlets.List().tag(sync=True)
    can_restore: Flag = traitlets.Bool().tag(sync=True)

    def __init__(
        self,
        target: Any,
        messages: Iterable[Mapping[str, str]] = (),
        *,
        system: str | None = None,
        **options: Any,
    ) -> None:
        # The conversation changes in the main thread, and when an answer has ended.
        self._talking = threading.RLock()
        self._answering, self._known_wrong = False, frozenset[str]()
        first = [{"role": "system", "content": system}] if system else []
        self._talk = Conversation()
        for one in [*first, *messages]:
            self._talk.add(_message(one))
        self._beside: tuple[Turn, Turn] | None = None
        self._shown = self._talk.version  # what the views know
        super().__init__(target, turns=self._turns(), **options)
        if not self.has_template:
            self.close()
            raise ValueError(
                "tokenizer: it has no chat template; use GenerateWidget, or set "
                "tokenizer.chat_template"
            )

    @property
    def messages(self) -> list[Message]:
        """What has been said so far in this branch, as chat templates take it; a copy."""
        with self._talking:
            return [dict(turn.message) for turn in self._talk.path]

    @action
    def send(self, text: str) -> None:
        """Say something and let the model answer.

        Raises:
            Busy: it is still answering.
            ValueError: there is nothing to say.
        """
        if not text.strip():
            raise ValueError("text: the message is empty")
        said = {"role": "user", "content": text}
        self._say([*self.messages, said], lambda: self._talk.add(said))

    @action
    def retry(self) -> None:
        """Let the model give another answer to what was asked last; the one that is there stays.

        Raises:
            Busy: it is still answering.
            ValueError: nothing was asked yet.
        """
        messages = self.messages
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        length = len(messages)
        self._say(messages, lambda: self._talk.cut(length))

    @action
    def edit(self, turn: int, text: str) -> None:
        """Say something else in a turn, as a branch beside it; the model answers to it.

        An answer of the model can be edited too; then it is your turn.

        Raises:
            Busy: it is still answering.
            IndexError: there is no such turn.
        """
        messages = self.messages
        if not 0 <= turn < len(messages):
            raise IndexError(f"turn: {turn} is not in the conversation of {len(messages)} turns")
        said = {**messages[turn], "content": text}

        def change() -> None:
            self._talk.cut(turn)
            self._talk.add(said)

        if said["role"] == "user":
            self._say([*messages[:turn], said], change)
        elif said != messages[turn]:
            self._change(change)

    @action
    def choose(self, turn: int, branch: int) -> None:
        """Go on with another branch: what was said in the place of a turn, from 0, as it was left.

        Raises:
            Busy: the model is still answering.
            IndexError: there is no such turn or branch.
        """
        self._change(lambda: self._talk.choose(turn, branch))

    @action
    def compare(self, turn: int, branch: int | None) -> None:
        """Show another branch of a turn beside it, with all that followed there, or none.

        Raises:
            IndexError: there is no such turn or branch.
        """
        with self._updating:
            with self._talking:
                siblings = self._talk.siblings(turn)
                if branch is None:
                    self._beside = None
                elif not 0 <= branch < len(siblings):
                    raise IndexError(f"branch: {branch} is not one of {len(siblings)}")
                else:
                    self._beside = self._talk.path[turn], siblings[branch]
            self.update(turns=self._turns())

    @action
    def resume(self) -> None:
        """Let the model go on with an answer that was stopped.

        Raises:
            Busy: it is still answering.
            ValueError: there is no answer to continue.
        """
        sampling = self.sampling
        with self._talking:
            self._refuse_if_answering()
            draft = self._talk.end.draft
            if draft is None:
                raise ValueError("there is no answer to continue")
            self.writer.open(draft)
            self._start(lambda: self.writer.resume(sampling))
            self._talk.cut(len(self._talk.path) - 1)
            self._answering = True
        self._views.ask()

    @action
    def clear(self) -> None:
        """Begin anew, after the instructions; `restore` or `choose` bring back what was said.

        Raises:
            Busy: it is still answering.
        """
        self._change(lambda: self._talk.cut(int(self._begins_with_instructions())))

    @action
    def restore(self) -> None:
        """Undo `clear`.

        Raises:
            Busy: it is still answering.
        """
        self._change(self._talk.restore)

    def to_markdown(self) -> str:
        """What was said in this branch."""
        parts = [f"**{NAMES[one['role']]}**\n\n{one['content']}" for one in self.messages]
        return "\n\n".join(parts) + "\n" if parts else ""

    def to_pandas(self) -> pd.DataFrame:
        """The tokens of the model's answers in this branch, with their probabilities.

        Columns: ``turn``, and those of `GenerateWidget.to_pandas`.
        """
        from swarm_notebook.report.formatting import data_frame

        with self._talking:
            drafts = [(at, turn.draft) for at, turn in enumerate(self._talk.path)]
        rows = [
            {"turn": at, **row}
            for at, draft in drafts
            if draft is not None
            for row in token_rows(self._vocabulary, draft)
        ]
        return data_frame(rows, ["turn", *TOKEN_COLUMNS])

    def summary(self) -> str:
        return f"{self.title}, {count(len(self.messages), 'message')}"

    def picture(self) -> str:
        """The conversation."""
        turns = [*self.turns, *([{"role": "assistant", "html": self.live}] if self.live else [])]
        shown = "".join(
            f'<div class="snw-dim">{escape(turn["role"])}</div>'
            f'<div class="snw-turn" dir="auto">{turn.get("html") or markdown.plain(turn["text"])}'
            f"</div>{warning(turn.get('suspicion', ''))}"
            for turn in turns
        )
        last = f'<div class="snw-dim">{escape(facts(self.note, self.stats))}</div>'
        return shell(f'<div class="snw-title">{escape(self.title)}</div>{shown}{last}')

    def _say(self, messages: list[Message], change: Callable[[], None]) -> None:
        """Let the model answer to these, which `change` makes the path."""
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("there is no message to answer; send one first")
        sampling = self.sampling
        ids = self._ids_of_chat(messages)
        with self._talking:
            self._refuse_if_answering()
            self._start(lambda: self.writer.write(ids, sampling))
            change()
            self._answering = True
        self._views.ask()

    def _change(self, change: Callable[[], None]) -> None:
        # The thread that shows an answer holds `_updating` until its turns are in the view: they
        # cannot come after these. Whoever needs both locks takes `_updating` first.
        with self._updating:
            with self._talking:
                self._refuse_if_answering()
                change()
                self._shown = self._talk.version
            self.update(turns=self._turns(), can_restore=self._talk.can_restore, note="")
        self._views.ask()

    def _begins_with_instructions(self) -> bool:
        return [one["role"] for one in self.messages[:1]] == ["system"]

    def _turns(self) -> list[dict[str, Any]]:
        """The path for the views."""
        turns = []
        for at, turn in enumerate(self._talk.path):
            siblings = self._talk.siblings(at)
            shown = self._show_turn(turn)
            shown["branch"] = [siblings.index(turn), len(siblings)]
            if self._beside is not None and self._beside[0] is turn:
                other = self._beside[1]
                after = [self._show_turn(one) for one in self._talk.following(other)]
                which = siblings.index(other)
                shown["beside"] = {**self._show_turn(other), "branch": which, "after": after}
            turns.append(shown)
        return turns

    def _show_turn(self, turn: Turn) -> dict[str, Any]:
        message = turn.message
        shown: dict[str, Any] = {"role": message["role"], "text": message["content"]}
        if message["role"] == "assistant":
            shown |= {"html": markdown.render(message["content"]), "edited": turn.draft is None}
        if turn.draft is not None:
            what = "this answer and what follows may be wrong; Retry asks other servers."
            _, said = self._suspicion(turn.draft, what)
            shown |= {"suspicion": said} if said else {}
        return shown

    def beat(self) -> None:
        """As every widget's; a server that was found wrong meanwhile is told."""
        super().beat()
        wrong = frozenset(self._wrong())
        if wrong != self._known_wrong:
            with self._updating, self._talking:
                self._known_wrong = wrong
                self.update(turns=self._turns())

    def _refuse_if_answering(self) -> None:
        if self._answering or self.writer.running:
            raise Busy("the model is still answering; stop it first, or wait for it to end")

    def _show_text(self, values: dict[str, Any], *, ended: bool) -> float | None:
        with self._talking:
            if not self._answering:
                return None
            began, text = time.monotonic(), self._written
            if ended:
                self._answering = False
                if text:
                    self._talk.answer(text, self.writer.draft)
                else:
                    self._talk.restore()  # another answer was asked for, and none has come
                values["live"] = ""
            else:
                values["live"] = markdown.render(text)
            if self._shown != self._talk.version:
                values["turns"] = self._turns()
                values["can_restore"] = self._talk.can_restore and not self._answering
                self._shown = self._talk.version
        return (time.monotonic() - began) / _RENDERING

    def _prompt_ids(self) -> Sequence[int]:
        messages = self.messages
        return self._ids_of_chat(messages) if messages else []

    def _estimate_traits(self) -> list[str]:
        return ["turns", "max_new_tokens"]


def _message(given: Mapping[str, str]) -> Message:
    role, content = given.get("role"), given.get("content")
    if role not in ROLES or not isinstance(content, str):
        raise ValueError(
            f"messages: {dict(given)!r:.100} is not of the form "
            '{"role": "user", "content": "text"}, with a role of ' + ", ".join(ROLES)
        )
    return {"role": role, "content": content}
