"""``%swarm chat``: turns, Stop, retry, an edited turn; what was typed is never taken for HTML."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser.notebook import Notebook
from playwright.sync_api import Locator, expect


@pytest.fixture(scope="module")
def chat(notebook: Notebook) -> Locator:
    return notebook.run("%swarm chat -n 60").get_by_test_id("chat").first


def say(chat: Locator, text: str) -> None:
    chat.get_by_test_id("message").fill(text)
    chat.get_by_test_id("message").press("Enter")


def turns(chat: Locator) -> Locator:
    return chat.get_by_test_id("turn")


def idle(chat: Locator) -> None:
    expect(chat.get_by_test_id("stop")).to_be_disabled()


def test_a_question_is_answered(notebook: Notebook, chat: Locator) -> None:
    say(chat, "What is the capital of Germany?")
    expect(turns(chat).nth(1)).to_contain_text("The capital of Germany is Berlin.")
    idle(chat)
    assert notebook.value("[m['role'] for m in chat.messages]") == "['user', 'assistant']"


def test_an_edited_turn_is_a_branch(notebook: Notebook, chat: Locator) -> None:
    turns(chat).first.get_by_test_id("edit").click()
    edit = chat.get_by_test_id("edit-text")
    edit.fill("What is the capital of <b>France</b>?")
    edit.press("Enter")
    expect(turns(chat).nth(1)).to_contain_text("Paris")
    idle(chat)
    expect(turns(chat)).to_have_count(2)
    expect(turns(chat).first.locator("b")).to_have_count(0)
    # Back, forth and back with the keyboard; the buttons keep the focus.
    place = turns(chat).first.get_by_test_id("place")
    expect(place).to_have_text("2/2")
    turns(chat).first.get_by_test_id("previous").focus()
    notebook.page.keyboard.press("Enter")
    expect(place).to_have_text("1/2")
    expect(turns(chat).nth(1)).to_contain_text("Berlin")
    turns(chat).first.get_by_role("button", name="Next branch").click()
    expect(turns(chat).nth(1)).to_contain_text("Paris")
    turns(chat).first.get_by_test_id("compare").click()
    expect(turns(chat).first.get_by_test_id("beside")).to_contain_text("Germany")
    turns(chat).first.get_by_test_id("compare").click()


def test_clear_can_be_undone(chat: Locator) -> None:
    clear = chat.get_by_test_id("clear")
    clear.click()
    expect(turns(chat)).to_have_count(0)
    expect(clear).to_have_text("Undo clear")
    clear.click()
    expect(turns(chat)).to_have_count(2)
    expect(clear).to_have_text("Clear")


def test_stop_and_retry(chat: Locator) -> None:
    say(chat, "Tell me a long story about the sea.")
    expect(chat.get_by_test_id("live")).to_contain_text(" ")
    chat.get_by_test_id("stop").click()
    idle(chat)
    expect(turns(chat)).to_have_count(4)
    chat.get_by_test_id("retry").click()
    expect(chat.get_by_test_id("stop")).to_be_enabled()
    chat.get_by_test_id("stop").click()
    idle(chat)
    expect(turns(chat)).to_have_count(4)


def test_pictures(chat: Locator, picture: Callable[[Locator, str], None]) -> None:
    picture(chat, "chat")
