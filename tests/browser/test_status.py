"""The tables of ``%swarm status`` and ``route`` on the screen."""

from __future__ import annotations

from collections.abc import Callable

from browser.notebook import Notebook
from playwright.sync_api import Locator, expect


def test_status_names_its_servers(
    notebook: Notebook, picture: Callable[[Locator, str], None]
) -> None:
    output = notebook.run("%swarm status")
    expect(output.get_by_text("all 30 blocks served")).to_be_visible()
    expect(output.get_by_role("row").filter(has_text="local-0")).to_be_visible()
    picture(output, "status")
    assert not notebook.errors


def test_a_long_wait_is_seen_and_goes_away(notebook: Notebook) -> None:
    go_on = notebook.path.parent / "go-on"
    number = notebook.start(
        "import time\n"
        "from pathlib import Path\n"
        "from swarm_notebook.progress import Waiting\n"
        "with Waiting('Reading', total=9, unit='blocks', count=lambda: 3, after=0.0):\n"
        f"    while not Path({str(go_on)!r}).exists(): time.sleep(0.1)"
    )
    line = notebook.output(number).get_by_text("Reading: 3 of 9 blocks")
    expect(line).to_be_visible()
    expect(notebook.output(number).locator("progress")).to_be_visible()
    go_on.touch()
    notebook.finish(number)
    expect(line).to_have_count(0)
