"""``%swarm lens``: the heat map by mouse and keyboard, and the hidden state in Python."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from browser.conftest import SCREENS
from browser.notebook import HEIGHT, WIDTH, Notebook
from playwright.sync_api import Locator, expect

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def lens(notebook: Notebook) -> Locator:
    output = notebook.run(f'%swarm lens "{TEXT}" -o lens')
    assert not output.inner_text()
    return notebook.run("lens").get_by_test_id("lens")


def test_the_last_block_says_what_the_model_says(lens: Locator) -> None:
    lens.get_by_label("Colour").select_option("probability")
    expect(lens.get_by_role("columnheader")).to_have_text(
        ["block", "The", "·capital", "·of", "·France", "·is"]
    )
    expect(lens.get_by_role("row")).to_have_count(31)
    top = lens.get_by_role("row").nth(1)
    expect(top.get_by_role("rowheader")).to_have_text("29")
    expect(top.get_by_role("gridcell").last).to_have_text("·Paris")


def test_pointing_at_a_cell_shows_its_top_tokens(notebook: Notebook, lens: Locator) -> None:
    lens.get_by_role("row").nth(1).get_by_role("gridcell").last.hover()
    details = lens.get_by_test_id("details")
    expect(details).to_contain_text("block 29, token 5 ·is")
    expect(details.get_by_role("listitem")).to_have_count(5)
    expect(details.get_by_role("listitem").first).to_contain_text("·Paris")
    expect(details).to_contain_text("bits")


def test_a_click_and_enter_give_the_state_to_python(notebook: Notebook, lens: Locator) -> None:
    lens.get_by_role("row").nth(30).get_by_role("gridcell").nth(1).click()
    expect(lens.get_by_test_id("details")).to_contain_text("selected: .hidden_state in Python")
    assert notebook.value("lens.selected") == "[0, 1]"
    # Keys move from the clicked cell: up a block, to the end of the row.
    lens.get_by_role("gridcell", selected=True).focus()
    for key in ("ArrowUp", "End", "Enter"):
        notebook.page.keyboard.press(key)
    assert notebook.value("lens.selected, tuple(lens.hidden_state.shape)") == "([1, 4], (576,))"
    inputs = f"**tokenizer({TEXT!r}, return_tensors='pt')"
    notebook.run(f"states = swarm.model({inputs}, output_hidden_states=True).hidden_states")
    assert notebook.value("bool((states[2][0, 4] - lens.hidden_state).abs().max() < 1e-4)") == (
        "True"
    )


def test_ranks_of_a_token_typed_in(notebook: Notebook, lens: Locator) -> None:
    box = lens.get_by_label("Token to rank")
    box.fill("·Paris")
    box.press("Enter")
    last = lens.get_by_role("row").nth(1).get_by_role("gridcell").last
    expect(last).to_have_text("1")
    expect(lens.get_by_label("Colour")).to_have_value("rank")
    box.fill("two words")
    box.press("Enter")
    expect(lens.get_by_test_id("error")).to_contain_text("ranking needs a single token")
    lens.get_by_role("button", name="Dismiss").click()
    expect(lens.get_by_test_id("error")).to_be_hidden()


def test_two_views_agree(notebook: Notebook, lens: Locator) -> None:
    other = notebook.run("lens").get_by_test_id("lens")
    other.get_by_label("Colour").select_option("entropy")
    expect(lens.get_by_label("Colour")).to_have_value("entropy")
    other.get_by_role("row").nth(5).get_by_role("gridcell").nth(2).click()
    expect(lens.get_by_role("gridcell", selected=True)).to_have_count(1)
    assert notebook.value("lens.selected") == "[25, 2]"


def test_it_can_be_taken_away_as_a_table_and_as_a_picture(
    notebook: Notebook, lens: Locator
) -> None:
    with notebook.page.expect_download() as download:
        lens.get_by_test_id("csv").click()
    head, *rows = download.value.path().read_text().splitlines()
    assert head.startswith("block,position,token,prediction,probability,entropy")
    assert len(rows) == 30 * 5
    assert rows[-1].startswith("29,4,·is,·Paris,")
    with notebook.page.expect_download() as download:
        lens.get_by_test_id("png").click()
    SCREENS.mkdir(parents=True, exist_ok=True)
    kept = SCREENS / "lens.png"
    download.value.save_as(kept)
    grid = lens.get_by_role("grid").bounding_box()
    assert grid is not None
    width, height = struct.unpack(">II", kept.read_bytes()[16:24])
    assert width > 2 * grid["width"]
    assert height > 2 * grid["height"]


def test_pictures(lens: Locator, picture: Callable[[Locator, str], None]) -> None:
    lens.get_by_label("Colour").select_option("probability")
    lens.get_by_role("row").nth(2).get_by_role("gridcell").last.hover()
    picture(lens, "lens")


def test_a_static_table_leaves_the_lens_its_colours(notebook: Notebook, lens: Locator) -> None:
    """Both are on one page, and each has a style sheet of its own."""
    colour = "cell => getComputedStyle(cell).backgroundColor"
    cell = lens.get_by_role("row").nth(1).get_by_role("gridcell").last
    before = cell.evaluate(colour)
    static = notebook.run(f"sn.probing.logit_lens(swarm, {TEXT!r}, blocks=[0, 29])").locator(
        "table"
    )
    assert cell.evaluate(colour) == before
    shown = [static.locator("tbody tr").nth(row).locator("td").last for row in (0, 1)]
    strong, weak = (each.evaluate(colour) for each in shown)
    assert len({strong, weak, "rgba(0, 0, 0, 0)"}) == 3
    # The notebook's own stripes do not shine through.
    for row in static.locator("tbody tr").all():
        assert row.evaluate(colour) == "rgba(0, 0, 0, 0)"


def test_a_lens_says_that_its_swarm_was_left(notebook: Notebook) -> None:
    notebook.run("away = sn.connect(local.initial_peers, model=local.model)")
    view = notebook.run(f"sn.widgets.LensWidget(away, {TEXT!r}, blocks=[29])")
    gone = view.get_by_test_id("gone")
    expect(gone).to_be_hidden()
    notebook.run("away.disconnect()")
    expect(gone).to_contain_text(
        "This notebook has disconnected from the swarm. To continue, connect again"
    )


def test_a_long_text_opens_on_its_end(notebook: Notebook) -> None:
    view = notebook.run(f"sn.widgets.LensWidget(swarm, {TEXT!r} * 8, blocks=[29])")
    row = view.get_by_test_id("lens").get_by_role("row").last
    box = view.locator(".sn-grid")
    inside = """(cell) => {
      const box = cell.closest(".sn-grid").getBoundingClientRect();
      const { left, right } = cell.getBoundingClientRect();
      return box.left <= left && right <= box.right + 1;
    }"""
    assert box.evaluate("(box) => box.scrollWidth > box.clientWidth")
    expect(row.get_by_role("gridcell")).to_have_count(32)
    assert row.get_by_role("gridcell").last.evaluate(inside)
    assert row.get_by_role("rowheader").evaluate(inside)
    # Also after another theme and width; but where somebody has scrolled to stays.
    notebook.theme(not notebook.dark)
    notebook.page.set_viewport_size({"width": 600, "height": HEIGHT})
    notebook.page.wait_for_function(inside, arg=row.get_by_role("gridcell").last.element_handle())
    # What is said of a cell has no room beside the grid, and stands below it.
    grid, below = box.bounding_box(), view.get_by_test_id("details").bounding_box()
    assert grid is not None
    assert below is not None
    assert below["y"] >= grid["y"] + grid["height"]
    box.hover()
    notebook.page.mouse.wheel(-9999, 0)
    first = row.get_by_role("gridcell").first.element_handle()
    notebook.page.wait_for_function(
        "(cell) => cell.closest('.sn-grid').scrollLeft === 0", arg=first
    )
    notebook.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    notebook.page.wait_for_timeout(500)
    assert box.evaluate("(box) => box.scrollLeft") == 0
