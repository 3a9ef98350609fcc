"""``%swarm map``: live while a cell runs, by mouse and keyboard, and a server killed in view."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable

import pytest
from browser.notebook import Notebook
from playwright.sync_api import Locator, expect

SERVERS = 3


@pytest.fixture(scope="module")
def shown(notebook: Notebook) -> Locator:
    return notebook.run("%swarm map").get_by_test_id("map")


def rows(shown: Locator) -> Locator:
    return shown.get_by_test_id("server")


def test_servers_blocks_and_redundancy(shown: Locator) -> None:
    expect(rows(shown)).to_have_count(SERVERS)
    expect(shown.get_by_test_id("headline")).to_have_text(re.compile("all 30 blocks served"))
    cover = shown.get_by_test_id("coverage").get_by_role("img")
    expect(cover).to_have_count(2)
    expect(cover.first).to_have_attribute("title", "blocks 0:15: 1 server")
    expect(cover.last).to_have_attribute("title", "blocks 15:30: 2 servers")


def test_a_row_is_chosen_by_keyboard_and_by_mouse(notebook: Notebook, shown: Locator) -> None:
    rows(shown).first.focus()
    notebook.page.keyboard.press("ArrowDown")
    expect(rows(shown).nth(1)).to_be_focused()
    notebook.page.keyboard.press("Enter")
    expect(shown.get_by_test_id("detail")).to_be_visible()
    expect(rows(shown).nth(1)).to_have_attribute("aria-selected", "true")
    rows(shown).first.click()
    expect(rows(shown).first).to_have_attribute("aria-selected", "true")
    # Without its only server, half of the model would be gone: said before it happens.
    expect(shown.get_by_test_id("detail")).to_contain_text("0:15")


def test_what_the_mouse_points_at_says_what_it_is(notebook: Notebook, shown: Locator) -> None:
    colour = "row => getComputedStyle(row.querySelector('th')).backgroundColor"
    row, other = rows(shown).nth(1), rows(shown).nth(2)
    notebook.page.mouse.move(2, 2)
    before = row.evaluate(colour)
    row.hover()
    pointed = f"(row) => ({colour})(row) !== {before!r}"
    notebook.page.wait_for_function(pointed, arg=row.element_handle())
    assert other.evaluate(colour) == before
    # The browser shows the title of what lies on top there.
    under = """(place) => {
      const { x, y, width, height } = place.getBoundingClientRect();
      const found = document.elementFromPoint(x + width / 2, y + height / 2);
      return found.closest("[title]")?.title;
    }"""
    legs = shown.get_by_test_id("route").get_by_role("button")
    legs.first.hover()
    assert re.search("used? local-0 for blocks 0:15$", legs.first.evaluate(under))
    track = row.locator(".sn-track")
    track.hover()
    assert "blocks 15:30" in track.evaluate(under)


def test_what_is_selected_in_the_details_stays_selected(notebook: Notebook, shown: Locator) -> None:
    if rows(shown).first.get_attribute("aria-selected") != "true":
        rows(shown).first.click()
    fact = shown.get_by_test_id("detail").locator("dd").first
    fact.click(click_count=3)
    selected = notebook.page.evaluate("getSelection().toString()")
    assert "local-0 (" in selected
    # The list is brought up to date once a second, and whenever Python sends something.
    notebook.page.evaluate("window.ticks = 0; setInterval(() => window.ticks++, 1000)")
    notebook.page.wait_for_function("window.ticks > 3")
    assert notebook.page.evaluate("getSelection().toString()") == selected


def test_two_views_agree(notebook: Notebook, shown: Locator) -> None:
    notebook.run("%swarm map -o again")
    one, two = (notebook.run("again").get_by_test_id("map") for _ in range(2))
    rows(one).nth(2).click()
    expect(rows(two).nth(2)).to_have_attribute("aria-selected", "true")


def test_a_killed_server_is_seen_while_a_cell_runs(
    notebook: Notebook, shown: Locator, picture: Callable[[Locator, str], None]
) -> None:
    told = notebook.value("' '.join(f'local-{n} {s.pid}' for n, s in enumerate(local.servers))")
    words = told.strip("'").split()
    pids = {name: int(pid) for name, pid in zip(words[::2], words[1::2], strict=True)}
    notebook.run("import torch; ids = tokenizer('Once upon a time', return_tensors='pt')")
    write = "model.generate(**ids, do_sample=False, max_new_tokens={0}, min_new_tokens={0})"
    notebook.run(f"whole = {write.format(60)}")
    # What the map shows from here on is the run that is to lose a server, and that run goes on
    # until the loss has been seen, however fast or slow the machine.
    enough = notebook.path.with_name("enough")
    notebook.run(
        "import pathlib\n"
        f"enough = pathlib.Path({str(enough)!r})\n"
        "def seen(ids, scores, **_):\n"
        "    return torch.full((len(ids),), enough.exists())"
    )
    pace = shown.get_by_test_id("pace")
    expect(pace).to_contain_text("idle")
    cell = notebook.start(f"again = {write.format(4000)[:-1]}, stopping_criteria=[seen])")
    expect(pace).to_contain_text("tokens/s,")
    way = rows(shown).filter(has=notebook.page.get_by_test_id("way"))
    expect(way).to_have_count(2)
    victim = way.last.get_attribute("data-peer")
    name = way.last.get_by_role("rowheader").inner_text()
    os.kill(pids[name], signal.SIGKILL)
    lost = shown.get_by_test_id("failover")
    expect(lost).to_contain_text(f"{name} lost, blocks 15:30")
    expect(notebook.cells.nth(cell).locator(".jp-InputPrompt").first).to_have_text("[*]:")
    expect(lost).to_contain_text("continued on")
    picture(shown, "map")
    enough.touch()
    notebook.finish(cell)
    notebook.run("length = min(whole.shape[1], again.shape[1])")
    assert notebook.value("torch.equal(whole[:, :length], again[:, :length])") == "True"
    gone = shown.locator(f'[data-peer="{victim}"][data-state="online"]')
    expect(gone).to_have_count(0)
