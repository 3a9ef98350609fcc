"""The Chat widget: turns, what is read again and what is not, and hostile answers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.patience import PATIENCE
from support.widgets import act, tokens_sent, until

import swarm_notebook as sn
from swarm_notebook.errors import Busy
from swarm_notebook.widgets import ChatWidget

GERMANY, FRANCE = "What is the capital of Germany?", "And what is the capital of France?"
ANSWER = "The capital of Germany is Berlin."
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + ';' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


@pytest.fixture
def chat(lettered: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatWidget]:
    """With the local tiny model, which talks on and on."""
    monkeypatch.setattr(lettered.model.generation_config, "eos_token_id", None)
    tokenizer = copy.deepcopy(lettered.tokenizer)
    tokenizer.chat_template = TEMPLATE
    widget = ChatWidget(lettered.model, tokenizer=tokenizer, max_new_tokens=8)
    yield widget
    widget.close()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens per request to the first server."""
    return tokens_sent(monkeypatch, to_first=True)


def answered(widget: ChatWidget) -> str:
    assert widget.wait(PATIENCE)
    assert not widget.error
    assert widget.messages[-1]["role"] == "assistant"
    return widget.messages[-1]["content"]


def template_ids(swarm: sn.Swarm, messages: list[dict[str, str]]) -> list[int]:
    tokenizer: Any = swarm.tokenizer
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def test_a_view_hears_that_python_is_there(chat: ChatWidget) -> None:
    said: list[Any] = []
    chat._send = lambda message, buffers=None: said.append(message)
    chat.beat()
    assert said == [{"method": "custom", "content": {"alive": True}}]


def test_a_conversation_reads_only_what_is_new(demo: sn.Swarm, sent: list[int]) -> None:
    chat = ChatWidget(demo, max_new_tokens=24)
    try:
        act(chat, "send", text=GERMANY)
        assert answered(chat) == ANSWER
        assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
        assert chat.turns[1]["html"] == f"<p>{ANSWER}</p>\n"
        assert chat.live == ""
        assert chat.note == "finished"
        first = len(template_ids(demo, chat.messages[:1]))
        assert sent[0] == first
        known = first + len(sent) - 1  # the last written token has not been read
        sent.clear()
        act(chat, "send", text=FRANCE)
        assert "Paris" in answered(chat)
        messages = chat.messages
        assert [message["content"] for message in messages[::2]] == [GERMANY, FRANCE]
        assert sent[0] == len(template_ids(demo, messages[:3])) - known
        assert chat.stats["computed"] == sent[0]
        assert "requests to 2 servers" in chat.preview
        expected = demo.model.generate(  # type: ignore[operator]
            **demo.tokenizer.apply_chat_template(  # type: ignore[union-attr]
                messages[:3], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            ),
            max_new_tokens=24,
            do_sample=False,
        )
        assert chat.writer.draft.ids == expected[0].tolist()

        # Asked again, only the last token of the question is read again.
        sent.clear()
        act(chat, "retry")
        assert answered(chat) == messages[-1]["content"]
        assert sent[0] == 1
        assert len(chat.messages) == 4

        # An edited question shares its beginning with the old one.
        sent.clear()
        act(chat, "edit", turn=0, text="What is the capital of Italy?")
        assert answered(chat)
        assert len(chat.turns) == 2
        assert sent[0] < 12
    finally:
        chat.close()


def test_stop_keeps_what_was_said_and_it_can_go_on(chat: ChatWidget) -> None:
    chat.max_new_tokens = 150
    chat.send("Hi")
    with pytest.raises(Busy):
        chat.send("again")
    with pytest.raises(Busy):
        chat.clear()
    until(lambda: bool(chat.live))
    act(chat, "stop")
    part = answered(chat)
    assert chat.note == "stopped"
    count = len(chat.writer.draft.tokens)
    assert 0 < count < 150
    chat.max_new_tokens = 5
    act(chat, "resume")
    assert answered(chat)[: len(part)] == part
    assert len(chat.writer.draft.tokens) == count + 5
    assert [turn["text"] for turn in chat.turns] == ["Hi", answered(chat)]


def test_turns_can_be_edited_and_exported(chat: ChatWidget) -> None:
    chat.send("one")
    answered(chat)
    act(chat, "edit", turn=1, text="my <b>own</b> words")
    assert chat.messages[1] == {"role": "assistant", "content": "my <b>own</b> words"}
    assert "&lt;b&gt;" in chat.turns[1]["html"]
    act(chat, "resume")
    assert "there is no answer to continue" in chat.error
    act(chat, "dismiss")
    act(chat, "send", text="two")
    answered(chat)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    act(chat, "edit", turn=9, text="x")
    assert "IndexError: turn: 9" in chat.error
    chat.messages[0]["content"] = "a copy"
    assert chat.messages[0]["content"] == "one"
    chat.clear()
    assert chat.messages == []
    act(chat, "retry")
    assert "there is no message to answer" in chat.error


def test_nothing_that_was_said_is_lost(chat: ChatWidget) -> None:
    pytest.importorskip("pandas")
    chat.send("one")
    first = answered(chat)
    chat.send("two")
    answered(chat)
    whole = chat.messages
    act(chat, "edit", turn=0, text="uno")
    answered(chat)
    assert [turn["branch"] for turn in chat.turns] == [[1, 2], [0, 1]]
    act(chat, "choose", turn=0, branch=0)
    assert chat.messages == whole
    act(chat, "clear")
    assert (chat.messages, chat.can_restore) == ([], True)
    act(chat, "restore")
    assert (chat.messages, chat.can_restore) == (whole, False)

    # Another answer to "two"; then back to the first one, which can be continued.
    chat.do_sample, chat.seed = True, 7
    act(chat, "retry")
    other = answered(chat)
    assert chat.turns[3]["branch"] == [1, 2]
    act(chat, "compare", turn=3, branch=0)
    assert chat.turns[3]["beside"]["text"] == whole[3]["content"]
    assert chat.turns[3]["beside"]["after"] == []
    act(chat, "choose", turn=3, branch=0)
    act(chat, "resume")
    assert answered(chat).startswith(whole[3]["content"])
    assert len(answered(chat)) > len(whole[3]["content"])
    assert chat.turns[3]["branch"] == [0, 2]
    act(chat, "choose", turn=3, branch=1)
    assert chat.messages[3]["content"] == other
    table = chat.to_pandas()
    assert list(table.turn) == [1] * 8 + [3] * 8
    assert (table.probability <= 1).all()
    assert chat.to_markdown().startswith(f"**You**\n\none\n\n**Model**\n\n{first}\n\n**You**")
    assert not chat.error


def test_messages_and_instructions_to_begin_with(lettered: Any) -> None:
    tokenizer = copy.deepcopy(lettered.tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        ChatWidget(lettered.model, tokenizer=tokenizer)
    tokenizer.chat_template = TEMPLATE
    given = [{"role": "user", "content": "<script>x</script>"}]
    chat = ChatWidget(lettered.model, given, system="Be brief", tokenizer=tokenizer)
    assert chat.messages == [{"role": "system", "content": "Be brief"}, *given]
    assert "<script>" not in chat.picture()
    assert "&lt;script&gt;" in chat.picture()
    assert repr(chat).endswith("2 messages>")
    chat.clear()
    assert [message["role"] for message in chat.messages] == ["system"]
    chat.close()
    with pytest.raises(ValueError, match=r"messages: .* is not of the form"):
        ChatWidget(lettered.model, [{"role": "robot", "content": "x"}], tokenizer=tokenizer)


def test_an_error_ends_the_turn_and_the_conversation_goes_on(
    chat: ChatWidget, lettered: Any
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with lettered.model.register_forward_pre_hook(fail):
        chat.send("Hi")
        assert chat.wait(PATIENCE)
    assert chat.error == "RuntimeError: out of memory"
    assert [message["role"] for message in chat.messages] == ["user"]
    act(chat, "dismiss")
    act(chat, "retry")
    answer = answered(chat)
    assert len(chat.writer.draft.tokens) == 8
    with lettered.model.register_forward_pre_hook(fail):
        act(chat, "retry")
        assert chat.wait(PATIENCE)
    assert chat.messages[-1]["content"] == answer  # it is there as before


def test_an_answer_that_comes_late_does_not_bring_back_what_was_cleared(chat: ChatWidget) -> None:
    reached, go_on = threading.Event(), threading.Event()
    update = chat.update

    def held_up(**values: Any) -> None:
        if len(values.get("turns", [])) == 2 and not reached.is_set():
            reached.set()
            assert go_on.wait(PATIENCE)
        update(**values)

    chat.update = held_up  # type: ignore[method-assign]
    chat.send("Hello")
    assert reached.wait(PATIENCE)  # the answer has ended, and the view is about to know
    clearing = threading.Thread(target=chat.clear)
    clearing.start()
    clearing.join(0.5)  # time to get in between, if that were possible
    go_on.set()
    clearing.join(PATIENCE)
    assert chat.wait(PATIENCE)
    assert chat.turns == chat.messages == []
