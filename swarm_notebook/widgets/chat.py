"""Talk with a model, in the form that it was trained on.

    chat = ChatWidget(swarm)               # or %swarm chat
    chat.messages                          # [{"role": "user", "content": …}, …]

It works in the background: the cell returns at once. Any earlier turn can be edited, which drops
what came after it. The model is asked with its chat template each time, but reads only what it has
not read before: the conversation's keys and values are kept, and cut back as far as needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import traitlets

from swarm_notebook.errors import Busy
from swarm_notebook.widgets.parts import markdown
from swarm_notebook.widgets.parts.base import action
from swarm_notebook.widgets.parts.static_html import facts, shell
from swarm_notebook.widgets.writing import WritingWidget

ROLES = ("system", "user", "assistant")
# A long answer takes longer to render: it may take this part of the time.
_RENDERING = 0.15

Message = dict[str, str]


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
        turns: what is shown: ``role``, ``text`` and, for the model's, ``html``.
        live: the HTML of the answer that is being written.

    Raises:
        ValueError: the tokenizer has no chat template, or a message has another form.
        TypeError: an option is unknown.
    """

    turns: traitlets.List[dict[str, Any]] = traitlets.List().tag(sync=True)
    live = traitlets.Unicode().tag(sync=True)

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
        self._answering = False
        first = [{"role": "system", "content": system}] if system else []
        self._messages = [_message(one) for one in [*first, *messages]]
        self._shown = self._messages  # the list that the views know; each change makes a new one
        super().__init__(target, turns=[_turn(one) for one in self._messages], **options)
        if not self.has_template:
            self.close()
            raise ValueError(
                "tokenizer: it has no chat template, so nobody knows how this model was taught to "
                "talk; use GenerateWidget, or set tokenizer.chat_template"
            )

    @property
    def messages(self) -> list[Message]:
        """What has been said so far, as chat templates take it; a copy."""
        with self._talking:
            return [dict(one) for one in self._messages]

    @action
    def send(self, text: str) -> None:
        """Say something and let the model answer.

        Raises:
            Busy: it is still answering.
            ValueError: there is nothing to say.
        """
        if not text.strip():
            raise ValueError("text: there is nothing to send")
        self._say([*self.messages, {"role": "user", "content": text}])

    @action
    def retry(self) -> None:
        """Drop the last answer and let the model give another.

        Raises:
            Busy: it is still answering.
            ValueError: nothing was asked yet.
        """
        messages = self.messages
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        self._say(messages)

    @action
    def edit(self, turn: int, text: str) -> None:
        """Replace what was said in a turn and drop what came after; the model answers to it.

        An answer of the model can be edited too; then it is your turn.

        Raises:
            Busy: it is still answering.
            IndexError: there is no such turn.
        """
        messages = self.messages
        if not 0 <= turn < len(messages):
            raise IndexError(f"turn: {turn} is not in the conversation of {len(messages)} turns")
        messages = [*messages[:turn], {**messages[turn], "content": text}]
        if messages[-1]["role"] == "user":
            self._say(messages)
        else:
            self._replace(messages)

    @action
    def resume(self) -> None:
        """Let the model go on with an answer that was stopped.

        Raises:
            Busy: it is still answering.
            ValueError: there is no answer of the model to go on with.
        """
        sampling = self.sampling
        with self._talking:
            self._refuse_if_answering()
            last = self._messages[-1] if self._messages else {}
            if last.get("role") != "assistant" or last["content"] != self._written():
                raise ValueError("there is no answer of the model to go on with")
            self._start(lambda: self.writer.resume(sampling))
            self._messages = self._messages[:-1]
            self._answering = True
        self._views.ask()

    @action
    def clear(self) -> None:
        """Forget what was said, but for the instructions that it began with.

        Raises:
            Busy: it is still answering.
        """
        self._replace([one for one in self.messages[:1] if one["role"] == "system"])

    def summary(self) -> str:
        count = len(self._messages)
        return f"{self.title}, {count} message{'' if count == 1 else 's'}"

    def picture(self) -> str:
        """The conversation."""
        turns = [*self.turns, *([{"role": "assistant", "html": self.live}] if self.live else [])]
        shown = "".join(
            f'<div class="snw-dim">{escape(turn["role"])}</div>'
            f'<div class="snw-turn" dir="auto">{turn.get("html") or markdown.plain(turn["text"])}'
            "</div>"
            for turn in turns
        )
        last = f'<div class="snw-dim">{escape(facts(self.note, self.stats))}</div>'
        return shell(f'<div class="snw-dim">{escape(self.title)}</div>{shown}{last}')

    def _say(self, messages: list[Message]) -> None:
        """Let the model answer to these."""
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("nothing was asked yet; send a message first")
        sampling = self.sampling
        ids = self._ids(messages)
        with self._talking:
            self._refuse_if_answering()
            self._start(lambda: self.writer.write(ids, sampling))
            self._messages, self._answering = messages, True
        self._views.ask()

    def _replace(self, messages: list[Message]) -> None:
        # The thread that shows an answer holds `_updating` until its turns are in the view: they
        # cannot come after these. Whoever needs both locks takes `_updating` first.
        with self._updating:
            with self._talking:
                self._refuse_if_answering()
                self._messages = self._shown = messages
            self.update(turns=[_turn(one) for one in messages], note="")
        self._views.ask()

    def _refuse_if_answering(self) -> None:
        if self._answering or self.writer.running:
            raise Busy("the model is still answering; stop it first, or wait for it to end")

    def _written(self) -> str:
        ids = self.writer.draft.written
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _show_text(self, values: dict[str, Any], *, ended: bool) -> float | None:
        with self._talking:
            if not self._answering:
                return None
            began, text = time.monotonic(), self._written()
            if ended:
                self._answering = False
                if text:
                    self._messages = [*self._messages, {"role": "assistant", "content": text}]
                values["live"] = ""
            else:
                values["live"] = markdown.render(text)
            if self._shown is not self._messages:
                values["turns"] = [_turn(one) for one in self._messages]
                self._shown = self._messages
        return (time.monotonic() - began) / _RENDERING

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        encoded = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

    def _prompt_ids(self) -> Sequence[int]:
        messages = self.messages
        return self._ids(messages) if messages else []

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


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message["role"], "text": message["content"]}
    if message["role"] == "assistant":
        turn["html"] = markdown.render(message["content"])
    return turn
