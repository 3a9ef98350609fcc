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
