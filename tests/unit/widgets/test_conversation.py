"""The tree of a conversation: branches, cuts, and nothing lost."""

from __future__ import annotations

import pytest

from swarm_notebook.widgets.parts.conversation import Conversation
from swarm_notebook.writing import Draft


def say(talk: Conversation, *texts: str) -> None:
    for text in texts:
        role = "user" if talk.end.message.get("role") != "user" else "assistant"
        talk.add({"role": role, "content": text})


def path(talk: Conversation) -> str:
    return " ".join(turn.message["content"] for turn in talk.path)


def test_an_edited_turn_is_a_branch_and_every_branch_is_as_it_was_left() -> None:
    talk = Conversation()
    say(talk, "a", "b", "c", "d")
    talk.cut(2)
    say(talk, "C")
    talk.cut(0)
    say(talk, "A", "B")
    assert path(talk) == "A B"
    talk.choose(0, 0)
    assert path(talk) == "a b C"
    talk.choose(2, 0)
    assert path(talk) == "a b c d"
    assert [len(talk.siblings(at)) for at in range(4)] == [2, 1, 2, 1]
    for turn, branch in ((4, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError):
            talk.choose(turn, branch)
    assert path(talk) == "a b c d"


def test_a_cut_can_be_undone_until_something_follows_it() -> None:
    talk = Conversation()
    assert not talk.can_restore
    say(talk, "a", "b")
    talk.cut(0)
    assert talk.can_restore
    talk.restore()
    assert path(talk) == "a b"
    talk.cut(0)
    say(talk, "x")
    assert not talk.can_restore
    talk.restore()
    assert path(talk) == "x"
    talk.choose(0, 0)
    assert path(talk) == "a b"


def test_an_answer_that_goes_on_is_the_same_turn() -> None:
    talk, draft = Conversation(), Draft([1])
    say(talk, "a")
    talk.answer("b", draft)
    talk.cut(1)
    talk.answer("b c", draft)
    talk.cut(1)
    talk.answer("other", Draft([1]))
    assert [turn.message["content"] for turn in talk.siblings(1)] == ["b c", "other"]
