"""``%swarm serve``: lend this machine's memory, from choosing blocks to the last request."""

from __future__ import annotations

import re
from collections.abc import Callable

from browser.notebook import Notebook
from playwright.sync_api import Locator, expect


def test_blocks_are_chosen_served_and_taken_back(
    notebook: Notebook, picture: Callable[[Locator, str], None]
) -> None:
    panel = notebook.run("%swarm serve --name mine --threads 1").get_by_test_id("serve")
    expect(panel.get_by_test_id("state")).to_have_text("not serving")
    for name, value in (("start", "28"), ("end", "30")):
        panel.get_by_test_id(name).fill(value)
        panel.get_by_test_id(name).press("Tab")
    expect(panel.get_by_test_id("needs")).to_have_text("needs 28.3 MB for weights, plus a cache")
    begin = panel.get_by_test_id("begin")
    begin.focus()
    begin.press("Enter")
    expect(panel.get_by_test_id("state")).to_have_text(re.compile("^serving"))
    expect(panel.get_by_test_id("counts")).to_contain_text("tokens")
    picture(panel, "serve")
    assert notebook.value("'mine' in [row.name for row in swarm.status().servers]") == "True"
    panel.get_by_test_id("stop").click()
    expect(panel.get_by_test_id("state")).to_have_text("not serving")
