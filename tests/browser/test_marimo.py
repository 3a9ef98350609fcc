"""The map and the lens in marimo, which has neither magics nor ipywidgets' front end."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, Page, expect
from support.forkserver import WARM
from support.patience import PATIENCE

if TYPE_CHECKING:
    from support.scene import Scene

MARIMO = "from marimo._cli.cli import main; main(prog_name='marimo')"
APP = """
import marimo
app = marimo.App()

@app.cell
def _():
    import swarm_notebook as sn
    from swarm_notebook.widgets import LensWidget, SwarmMap
    swarm = sn.connect({peers!r}, model={model!r})
    return LensWidget, SwarmMap, swarm

@app.cell
def _(LensWidget, swarm):
    lens = LensWidget(swarm, [5, 6, 7])
    lens
    return (lens,)

@app.cell
def _(SwarmMap, swarm):
    SwarmMap(swarm)
"""


@pytest.fixture(scope="module")
def page(
    tiny_scene: Scene, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    """The app in a window."""
    folder = tmp_path_factory.mktemp("marimo")
    app = folder / "app.py"
    app.write_text(APP.format(peers=tiny_scene.local.initial_peers, model=tiny_scene.local.model))
    log = folder / "marimo.log"
    command = [*WARM, MARIMO, "run", str(app), "--headless", "--no-token", "--no-check"]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        with browser.new_context() as window:
            opened = window.new_page()
            opened.goto(_address(server, log))
            # Now the app has all its processes.
            expect(opened.get_by_test_id("lens")).to_be_visible()
            yield opened
    finally:
        server.terminate()
        server.wait(PATIENCE)


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    """What marimo prints when it listens."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := re.search(r"http://[\w.:]+", log.read_text(errors="replace")):
            return found[0]
        try:
            server.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        break
    raise RuntimeError(f"marimo did not start:\n{log.read_text(errors='replace')[-2000:]}")


def test_marimo_shows_the_map_and_the_lens(page: Page) -> None:
    lens = page.get_by_test_id("lens")
    expect(lens.get_by_role("gridcell")).to_have_count(15)
    lens.get_by_role("gridcell").first.click()
    expect(lens.get_by_test_id("details")).to_contain_text("block 4, token 1")
    expect(lens.get_by_role("gridcell", selected=True)).to_have_count(1)
    expect(page.get_by_test_id("map").get_by_test_id("server")).to_have_count(2)
