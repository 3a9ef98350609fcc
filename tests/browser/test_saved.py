"""Widgets without the kernel that made them: saved, reopened, restarted, converted to HTML."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browser.lab import Lab
from browser.notebook import Notebook
from nbconvert import HTMLExporter
from playwright.sync_api import Browser, Locator, Page, Route, expect

STATE = "application/vnd.jupyter.widget-state+json"
SCRIPTS = Path(__file__).parents[2] / "js" / "node_modules"
CDN = {
    "require": SCRIPTS / "requirejs" / "require.js",
    "html-manager": SCRIPTS / "@jupyter-widgets" / "html-manager" / "dist" / "embed-amd.js",
    "anywidget": Path(sys.prefix) / "share" / "jupyter" / "nbextensions" / "anywidget" / "index.js",
}
# nbconvert's pages load them, whether or not a widget is alive there.
needs_scripts = pytest.mark.skipif(
    not SCRIPTS.is_dir(), reason="npm has not installed js/node_modules"
)
WIDGETS = """
from swarm_notebook.widgets import LensWidget, SwarmMap, TrainingMonitor
from IPython.display import display
with TrainingMonitor() as kept:
    for loss in (3.0, 2.0, 1.0):
        kept.log(loss=loss)
kept_lens = LensWidget(swarm, "The capital of France is", blocks=range(26, 30))
kept_lens.selected = [27, 2]
display(SwarmMap(swarm), kept, kept_lens)
"""


@pytest.fixture(scope="module")
def saved(notebook: Notebook) -> dict[str, Any]:
    """The file, with the widgets' state as Lab saves it."""
    notebook.run(WIDGETS)
    found = notebook.save()
    assert found["metadata"]["widgets"][STATE]["state"]
    return found


def check(page: Page | Locator) -> None:
    """The widgets of the last cell are there, with what they last showed."""
    monitor = page.get_by_test_id("monitor").last
    expect(monitor.get_by_test_id("state")).to_have_text("finished")
    expect(monitor.get_by_test_id("facts")).to_contain_text("step 3")
    lens = page.get_by_test_id("lens").last
    expect(lens.get_by_role("gridcell", selected=True)).to_have_count(1)
    expect(lens.get_by_role("row").nth(1).get_by_role("gridcell").last).to_have_text("·Paris")
    expect(page.get_by_test_id("map").last.get_by_test_id("server").first).to_be_visible()


def test_a_reopened_notebook_shows_the_last_state(
    saved: dict[str, Any], lab: Lab, open_notebook: Callable[[str], Notebook]
) -> None:
    """In another file, so with another kernel, that knows nothing of these widgets."""
    (lab.folder / "copy.ipynb").write_text(json.dumps(saved), encoding="utf-8")
    copy = open_notebook("copy.ipynb")
    check(copy.page)
    gone = copy.page.get_by_test_id("lens").last.get_by_test_id("gone")
    expect(gone).to_have_text("No kernel is connected: this is the last state.")
    # Views of widgets whose kernel is gone can still be looked around in.
    copy.page.get_by_test_id("lens").last.get_by_role("gridcell").first.hover()
    expect(copy.page.get_by_test_id("lens").last.get_by_test_id("details")).to_contain_text("bits")
    assert not copy.errors


def test_a_restarted_kernel_leaves_the_view_and_can_make_new_ones(
    open_notebook: Callable[[str], Notebook],
) -> None:
    fresh = open_notebook("restart.ipynb")
    code = (
        "from swarm_notebook.widgets import TrainingMonitor\n"
        "with TrainingMonitor() as monitor: monitor.log(loss={})\n"
    )
    first = fresh.run(code.format(4.5)).get_by_test_id("monitor")
    expect(first).to_contain_text("4.5")
    fresh.restart()
    expect(first).to_contain_text("4.5")
    expect(first.get_by_test_id("gone")).to_have_text(re.compile("kernel has ended|No kernel"))
    second = fresh.run(code.format(2.5)).get_by_test_id("monitor")
    expect(second).to_contain_text("2.5")
    expect(second.get_by_test_id("gone")).to_be_hidden()
    assert not fresh.errors


def converted(browser: Browser, notebook: Any, path: Path) -> Page:
    """The notebook as nbconvert's HTML, in a window that reaches nothing but `CDN`."""
    path.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    page = browser.new_context().new_page()
    page.route(re.compile("^https?:"), from_disk)
    page.goto(path.as_uri(), wait_until="domcontentloaded")
    return page


def from_disk(route: Route) -> None:
    """What nbconvert's pages fetch to show live widgets, from where it is on this machine."""
    for part, path in CDN.items():
        if part in route.request.url:
            return route.fulfill(path=path, content_type="text/javascript")
    return route.abort()


@needs_scripts
def test_nbconvert_shows_the_pictures_of_all(
    saved: dict[str, Any], browser: Browser, tmp_path: Path
) -> None:
    """A notebook without its widgets' state, such as our examples: what GitHub shows as well."""
    notebook = nbformat.reads(json.dumps(saved), as_version=4)
    del notebook.metadata["widgets"]
    page = converted(browser, notebook, tmp_path / "pictures.html")
    expect(page.get_by_text("finished at step 3").last).to_be_visible()
    expect(page.locator(".sn-curves polyline").last).to_be_visible()
    expect(page.locator(".sn-heat td").last).to_be_visible()
    expect(page.locator(".sn-view").last).to_contain_text("local-0")
    page.context.close()


@needs_scripts
def test_nbconvert_shows_the_saved_state_of_all(
    saved: dict[str, Any], browser: Browser, tmp_path: Path
) -> None:
    """As Lab saves it: the page brings the widgets' own scripts to life."""
    page = converted(
        browser, nbformat.reads(json.dumps(saved), as_version=4), tmp_path / "state.html"
    )
    check(page)
    page.context.close()
