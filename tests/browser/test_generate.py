"""``%swarm generate --widget``: run, stop, continue and branch, with the kernel free meanwhile."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from browser.notebook import Notebook
from playwright.sync_api import Locator, expect

HOSTILE = "<img src=x onerror=document.title='harmed'> \u202eright to left\u202c 🦙 " + "long" * 200


@pytest.fixture(scope="module")
def writer(notebook: Notebook) -> Locator:
    notebook.run("%swarm generate --widget --raw -n 400 -o writer")
    return notebook.run("writer").get_by_test_id("generate")


def tokens(writer: Locator) -> Locator:
    return writer.get_by_test_id("token")


def test_text_streams_while_the_kernel_is_free(notebook: Notebook, writer: Locator) -> None:
    prompt = writer.get_by_test_id("prompt")
    prompt.fill("The three primary colours are")
    prompt.press("Control+Enter")
    expect(tokens(writer).nth(3)).to_be_visible(timeout=30_000)
    assert notebook.value("6 * 7") == "42"
    expect(writer.get_by_test_id("stop")).to_be_enabled()


def test_stop_in_mid_generation_keeps_the_text(notebook: Notebook, writer: Locator) -> None:
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("status")).to_have_text("stopped", timeout=10_000)
    written = tokens(writer).count()
    assert 0 < written < 400
    expect(writer.get_by_test_id("stats")).to_contain_text("tokens/s")
    expect(writer.get_by_test_id("shares")).to_contain_text("local-0")
    assert notebook.value("len(writer.tokens), writer.text == ''") == f"({written}, False)"


def test_continue_reads_no_more_than_the_last_token(notebook: Notebook, writer: Locator) -> None:
    before = tokens(writer).count()
    writer.get_by_test_id("continue").click()
    expect(tokens(writer).nth(before + 2)).to_be_visible(timeout=20_000)
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("status")).to_have_text("stopped")
    expect(writer.get_by_test_id("stats")).to_contain_text(re.compile(r"· [01] of the prompt read"))


def test_a_click_on_an_alternative_branches(notebook: Notebook, writer: Locator) -> None:
    tokens(writer).nth(2).hover()
    choices = writer.get_by_test_id("alternatives")
    expect(choices).to_be_visible()
    other = choices.get_by_test_id("alternative").nth(1)
    label = other.get_attribute("aria-label") or ""
    word = re.search(r"Branch with (.+), [\d.<]+", label)
    assert word
    other.click()
    expect(tokens(writer).nth(5)).to_be_visible(timeout=20_000)
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("status")).to_have_text("stopped")
    expect(tokens(writer).nth(2)).to_have_text(word[1].replace("·", " "))


def test_tokens_by_keyboard(notebook: Notebook, writer: Locator) -> None:
    tokens(writer).first.focus()
    notebook.page.keyboard.press("ArrowRight")
    expect(tokens(writer).nth(1)).to_be_focused()
    expect(writer.get_by_test_id("alternatives")).to_be_visible()
    notebook.page.keyboard.press("Escape")
    expect(writer.get_by_test_id("alternatives")).to_be_hidden()


def test_pictures(writer: Locator, picture: Callable[[Locator, str], None]) -> None:
    writer.get_by_test_id("continue").click()
    expect(tokens(writer).nth(30)).to_be_visible(timeout=30_000)
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("status")).to_have_text("stopped")
    picture(writer, "generate")


def test_a_hostile_prompt_is_text(notebook: Notebook, writer: Locator) -> None:
    title = notebook.page.title()
    prompt = writer.get_by_test_id("prompt")
    prompt.fill(HOSTILE)
    prompt.press("Control+Enter")
    expect(tokens(writer).nth(1)).to_be_visible(timeout=30_000)
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("status")).to_have_text("stopped")
    assert notebook.page.title() == title
    expect(writer.locator("img")).to_have_count(0)
    assert not notebook.errors
