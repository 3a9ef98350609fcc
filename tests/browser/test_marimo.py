"""The widgets in marimo, which has neither magics nor ipywidgets' front end."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from support.forkserver import WARM
from support.hosting import HostedSwarm
from support.letter_tokenizer import add_tokenizer
from support.patience import PATIENCE
from support.tiny import tiny_model

MARIMO = "from marimo._cli.cli import main; main(prog_name='marimo')"
APP = """
import marimo
app = marimo.App()

@app.cell
def _():
    import swarm_notebook as sn
    from swarm_notebook import widgets
    swarm = sn.connect({peers!r}, model={model!r})
    swarm.tokenizer.chat_template = "{{{{ messages[-1].content }}}}"
    swarm.model.generation_config.eos_token_id = None
    return swarm, widgets

@app.cell
def _(swarm, widgets):
    lens = widgets.LensWidget(swarm, [5, 6, 7])
    lens
    return (lens,)

@app.cell
def _(swarm, widgets):
    widgets.SwarmMap(swarm)

@app.cell
def _(swarm, widgets):
    widgets.GenerateWidget(swarm, "Hello", max_new_tokens=12)

@app.cell
def _(swarm, widgets):
    widgets.ChatWidget(swarm, max_new_tokens=8)

@app.cell
def _(widgets):
    monitor = widgets.TrainingMonitor()
    with monitor:
        for loss in (3, 2, 1):
            monitor.log(loss=loss)
    monitor

@app.cell
def _(widgets):
    widgets.ServePanel({model!r}, threads=1)
"""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostedSwarm]:
    """Two of the tiny Llama, with a tokenizer."""
    folder = add_tokenizer(tiny_model("llama", tmp_path_factory.mktemp("lettered")))
    with HostedSwarm(folder, [(0, 2), (2, 5)]) as hosted:
        yield hosted


@pytest.fixture(scope="module")
def page(
    servers: HostedSwarm, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    """The app in a window."""
    folder = tmp_path_factory.mktemp("marimo")
    app = folder / "app.py"
    app.write_text(APP.format(peers=servers.initial_peers, model=str(servers.model)))
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


def test_texts_are_written_in_marimo(page: Page) -> None:
    text = page.get_by_test_id("generate")
    text.get_by_test_id("run").click()
    expect(text.get_by_test_id("token")).to_have_count(12)
    message = page.get_by_test_id("message")
    message.fill("Hello")
    message.press("Enter")
    expect(page.get_by_test_id("turn")).to_have_count(2)


def test_a_training_run_and_a_server_in_marimo(page: Page) -> None:
    expect(page.get_by_test_id("monitor").get_by_test_id("state")).to_have_text("finished")
    panel = page.get_by_test_id("serve")
    panel.get_by_test_id("begin").click()
    expect(panel.get_by_test_id("state")).to_have_text(re.compile("^serving"))
    panel.get_by_test_id("stop").click()
    expect(panel.get_by_test_id("state")).to_have_text("not serving")
