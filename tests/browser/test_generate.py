"""``%swarm generate --widget``: run, stop, continue and branch, with the kernel free meanwhile."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from browser.notebook import Notebook
from playwright.sync_api import Locator, expect

HOSTILE = "<img src=x onerror=document.title='harmed'> \u202eright to left\u202c 🦙 " + "long" * 200

# A model would take minutes; what it writes comes as from the writer's own thread, in bursts.
LONG = """
import threading, time
from swarm_notebook.widgets import GenerateWidget
from swarm_notebook.writing import Token
long = GenerateWidget(swarm, "A long text:")
word, other = tokenizer.encode(" word other")
def write(count):
    for number in range(count):
        long.writer._take(Token(word, 0.9, ((word, 0.9), (other, 0.1))))
        if number < 50 or number % 1000 == 999:
            long.writer._on_change()
            time.sleep(0.05)
    long.writer._on_change()
long
"""


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
    expect(tokens(writer).nth(3)).to_be_visible()
    assert notebook.value("6 * 7") == "42"
    expect(writer.get_by_test_id("stop")).to_be_enabled()


def test_stop_in_mid_generation_keeps_the_text(notebook: Notebook, writer: Locator) -> None:
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("status")).to_have_text("stopped")
    written = tokens(writer).count()
    assert 0 < written < 400
    expect(writer.get_by_test_id("stats")).to_contain_text("tokens/s")
    expect(writer.get_by_test_id("shares")).to_contain_text("local-0")
    assert notebook.value("len(writer.tokens), writer.text == ''") == f"({written}, False)"


def test_continue_reads_no_more_than_the_last_token(notebook: Notebook, writer: Locator) -> None:
    before = tokens(writer).count()
    writer.get_by_test_id("continue").click()
    expect(tokens(writer).nth(before + 2)).to_be_visible()
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("status")).to_have_text("stopped")
    expect(writer.get_by_test_id("stats")).to_contain_text(
        re.compile(r"· (0 prompt tokens|1 prompt token) processed")
    )


def test_a_click_on_an_alternative_branches(notebook: Notebook, writer: Locator) -> None:
    tokens(writer).nth(2).hover()
    choices = writer.get_by_test_id("alternatives")
    expect(choices).to_be_visible()
    other = choices.get_by_test_id("alternative").nth(1)
    label = other.get_attribute("aria-label") or ""
    word = re.search(r"Branch with (.+), [\d.<]+", label)
    assert word
    other.click()
    expect(tokens(writer).nth(5)).to_be_visible()
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("status")).to_have_text("stopped")
    expect(tokens(writer).nth(2)).to_have_text(word[1].replace("·", " "))


def test_the_text_before_a_branch_is_still_there(notebook: Notebook, writer: Locator) -> None:
    place = writer.get_by_test_id("place")
    expect(place).to_have_text("2/2")
    expect(writer.get_by_test_id("origin")).to_have_text("branched from text 1 at token 3")
    branched = tokens(writer).nth(2).inner_text()
    writer.get_by_role("button", name="Previous text").click()
    expect(place).to_have_text("1/2")
    expect(tokens(writer).nth(2)).not_to_have_text(branched)
    writer.get_by_test_id("compare").click()
    expect(writer.get_by_test_id("aside").locator("mark")).to_contain_text(branched)
    writer.get_by_test_id("compare").click()
    writer.get_by_role("button", name="Next text").focus()
    notebook.page.keyboard.press("Enter")
    expect(tokens(writer).nth(2)).to_have_text(branched)
    with notebook.page.expect_download() as download:
        writer.get_by_test_id("csv").click()
    assert download.value.path().read_text().startswith("position,text,probability,alternatives")


def test_tokens_by_keyboard(notebook: Notebook, writer: Locator) -> None:
    tokens(writer).first.focus()
    notebook.page.keyboard.press("ArrowRight")
    expect(tokens(writer).nth(1)).to_be_focused()
    expect(writer.get_by_test_id("alternatives")).to_be_visible()
    notebook.page.keyboard.press("Escape")
    expect(writer.get_by_test_id("alternatives")).to_be_hidden()


def test_escape_sends_alternatives_away_from_under_the_pointer(
    notebook: Notebook, writer: Locator
) -> None:
    choices = writer.get_by_test_id("alternatives")
    writer.get_by_test_id("csv").hover()
    tokens(writer).nth(1).hover()
    expect(choices).to_be_visible()
    choices.get_by_test_id("alternative").first.focus()
    notebook.page.keyboard.press("Escape")
    expect(choices).to_be_hidden()
    tokens(writer).nth(1).hover(position={"x": 2, "y": 4})
    notebook.page.wait_for_timeout(500)
    expect(choices).to_be_hidden()
    tokens(writer).nth(2).hover()
    expect(choices).to_be_visible()
    notebook.page.keyboard.press("Escape")
    expect(choices).to_be_hidden()


def test_two_views_agree(notebook: Notebook, writer: Locator) -> None:
    prompt = writer.get_by_test_id("prompt")
    prompt.fill("Some text,")
    prompt.press("Control+Enter")
    expect(writer.get_by_test_id("stop")).to_be_enabled()
    expect(tokens(writer).nth(3)).to_be_visible()
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("status")).to_have_text("stopped")
    other = notebook.run("writer").get_by_test_id("generate")
    expect(tokens(other).nth(3)).to_be_visible()
    assert tokens(other).all_text_contents() == tokens(writer).all_text_contents()
    other.get_by_test_id("prompt").fill("One text,")
    expect(writer.get_by_test_id("prompt")).to_have_value("One text,")
    other.get_by_test_id("run").click()
    expect(writer.get_by_test_id("stop")).to_be_enabled()
    expect(tokens(writer).nth(3)).to_be_visible()
    writer.get_by_test_id("stop").click()
    for view in (writer, other):
        expect(view.get_by_test_id("status")).to_have_text("stopped")
        expect(view.get_by_test_id("stop")).to_be_disabled()
    written = tokens(writer).all_text_contents()
    assert tokens(other).all_text_contents() == written
    assert len(written) > 3


def test_pictures(writer: Locator, picture: Callable[[Locator, str], None]) -> None:
    writer.get_by_test_id("continue").click()
    expect(tokens(writer).nth(30)).to_be_visible()
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("status")).to_have_text("stopped")
    picture(writer, "generate")


def test_a_missing_server_is_told_at_once(notebook: Notebook) -> None:
    notebook.run("far = sn.connect(local.initial_peers, model=local.model, timeout=4)")
    notebook.run("far.connection.directory.min_bits = 99")  # now no server will do
    view = notebook.run("sn.widgets.GenerateWidget(far, 'Hello')").get_by_test_id("generate")
    view.get_by_test_id("run").click()
    expect(view.get_by_test_id("status")).to_contain_text("No server holds blocks 0:30")
    expect(view.get_by_test_id("waited")).to_have_text(re.compile(r"^\d of 4 s$"))
    expect(view.get_by_test_id("error")).to_contain_text("MissingBlocks: no server holds")
    expect(view.get_by_test_id("cost")).to_contain_text("The next run waits for servers: no server")
    notebook.run("far.disconnect()")
    expect(view.get_by_test_id("gone")).to_contain_text(
        "This notebook has disconnected from the swarm"
    )


def test_a_hostile_prompt_is_text(notebook: Notebook, writer: Locator) -> None:
    title = notebook.page.title()
    prompt = writer.get_by_test_id("prompt")
    prompt.fill(HOSTILE)
    prompt.press("Control+Enter")
    expect(tokens(writer).nth(1)).to_be_visible()
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("status")).to_have_text("stopped")
    assert notebook.page.title() == title
    expect(writer.locator("img")).to_have_count(0)
    assert not notebook.errors


def test_a_double_click_on_run_is_one_run(notebook: Notebook, writer: Locator) -> None:
    texts = int(notebook.value("writer.texts"))
    writer.get_by_test_id("run").dblclick()
    expect(writer.get_by_test_id("stop")).to_be_enabled()
    writer.get_by_test_id("stop").click()
    expect(writer.get_by_test_id("stop")).to_be_disabled()
    expect(writer.get_by_role("alert").filter(visible=True)).to_have_count(0)
    assert int(notebook.value("writer.texts")) == texts + 1


def test_a_text_of_20000_tokens_can_be_read_and_worked_with(notebook: Notebook) -> None:
    view = notebook.run(LONG).get_by_test_id("generate")
    notebook.run("writing = threading.Thread(target=write, args=[20_000]); writing.start()")
    expect(tokens(view)).to_have_count(20_000)
    text = view.get_by_test_id("text")
    # It follows the end, until somebody scrolls up to read.
    expect(tokens(view).last).to_be_in_viewport()
    text.hover()
    notebook.page.mouse.wheel(0, -3000)
    expect(tokens(view).last).not_to_be_in_viewport()
    tokens(view).nth(10_000).scroll_into_view_if_needed()
    top = text.evaluate("(text) => text.scrollTop")
    assert top > 0
    notebook.run("write(3)")
    expect(tokens(view)).to_have_count(20_003)
    assert text.evaluate("(text) => text.scrollTop") == top
    # A token in the middle shows what else it might have been, by mouse and by keyboard.
    tokens(view).nth(10_000).hover()
    expect(view.get_by_test_id("alternative").nth(1)).to_have_text(re.compile("·other"))
    tokens(view).nth(10_000).focus()
    notebook.page.keyboard.press("ArrowRight")
    expect(tokens(view).nth(10_001)).to_be_focused()
    notebook.page.keyboard.press("End")
    expect(tokens(view).last).to_be_in_viewport()
    # Typing: every key arrives, in the page and in the kernel.
    prompt = view.get_by_test_id("prompt")
    prompt.fill("")
    prompt.press_sequentially("Typed beside it")
    expect(prompt).to_have_value("Typed beside it")
    assert notebook.value("long.prompt") == "'Typed beside it'"
    notebook.run("long.edit(19_000, ' other')")
    expect(tokens(view)).to_have_count(19_001)
    expect(tokens(view).last).to_have_text(" other")
    assert not notebook.errors
    notebook.run("long.close()")  # what is open is saved with the notebook
    expect(view).to_have_count(0)


def test_a_view_opened_on_a_long_text_begins_at_its_end(notebook: Notebook) -> None:
    notebook.run(LONG)
    notebook.run("write(2_000)")
    view = notebook.run("long").get_by_test_id("generate")
    expect(tokens(view)).to_have_count(2_000)
    text = view.get_by_test_id("text")
    text.scroll_into_view_if_needed()
    expect(tokens(view).last).to_be_in_viewport()
    assert text.evaluate("(text) => text.scrollTop") > 0
