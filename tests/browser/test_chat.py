"""``%swarm chat``: turns, Stop, retry, an edited turn; what was typed is never taken for HTML."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser.lab import Lab
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
    beside = turns(chat).first.get_by_test_id("beside")
    expect(beside).to_contain_text("Germany")
    expect(beside).to_contain_text("Berlin")
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


def test_what_is_typed_and_all_branches_are_there_after_a_reload(
    notebook: Notebook, chat: Locator, lab: Lab
) -> None:
    prompts = notebook.run("sn.widgets.GenerateWidget(swarm)").get_by_test_id("prompt")
    prompts.fill("Once upon a")
    turns(chat).nth(2).get_by_test_id("edit").click()
    edit = turns(chat).nth(2).get_by_test_id("edit-text")
    edit.fill("Tell me a short")
    chat.get_by_test_id("message").fill("And the")
    # Nobody leaves the box: it is kept after a pause.
    notebook.page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status == 'idle'"
    )
    notebook.page.wait_for_timeout(1000)
    notebook.save()
    notebook.open(lab.address(notebook.path.name))
    expect(chat.get_by_test_id("message")).to_have_value("And the")
    expect(prompts).to_have_value("Once upon a")
    expect(edit).to_have_value("Tell me a short")
    assert notebook.value("chat.typed") == "'And the'"
    assert notebook.value("chat.edits[0]['text']") == "'Tell me a short'"
    edit.press("Escape")
    expect(edit).to_have_count(0)
    expect(turns(chat)).to_have_count(4)
    expect(turns(chat).first.get_by_test_id("place")).to_have_text("2/2")
    turns(chat).first.get_by_test_id("previous").click()
    expect(turns(chat).nth(1)).to_contain_text("Berlin")


def test_a_slider_steers(notebook: Notebook) -> None:
    notebook.run(
        "import torch\n"
        "from swarm_notebook.probing.steering import SteeringVector\n"
        "direction = torch.randn(576, generator=torch.Generator().manual_seed(0))\n"
        "direction = SteeringVector(swarm.name, 10, 10 * direction)"
    )
    shown = notebook.run("%swarm chat --steer direction --strength 0 -n 8")
    steered = shown.get_by_test_id("chat").first
    say(steered, "What is the capital of Germany?")
    answer = turns(steered).nth(1).locator(".sn-said")
    idle(steered)
    plain = answer.inner_text()
    slider = steered.get_by_label("steering, block 10")
    expect(slider).to_have_value("0")
    for key, value in (("End", "10"), ("Home", "-10")):
        slider.press(key)
        expect(slider).to_have_value(value)
        expect(steered.locator("output")).to_have_text(f"{value} ×")
        steered.get_by_test_id("retry").click()
        expect(answer).not_to_have_text(plain)
        idle(steered)
        assert answer.inner_text() != plain
    slider.fill("0")
    steered.get_by_test_id("retry").click()
    expect(steered.get_by_test_id("place")).to_have_text("4/4")
    idle(steered)
    expect(answer).to_have_text(plain)
    assert notebook.value("chat.strength") == "0.0"
