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
    begin = panel.get_by_test_id("begin")
    for name, value in (("start", "20"), ("end", "10")):
        panel.get_by_test_id(name).fill(value)
        panel.get_by_test_id(name).press("Tab")
    expect(panel.get_by_test_id("refused")).to_have_text(
        "20:10 contains no block: the start must be below the end"
    )
    expect(begin).to_be_disabled()
    for name, value in (("start", "28"), ("end", "30")):
        panel.get_by_test_id(name).fill(value)
        panel.get_by_test_id(name).press("Tab")
    expect(panel.get_by_test_id("needs")).to_have_text("needs 28.3 MB for weights, plus a cache")
    expect(panel.get_by_test_id("refused")).to_be_empty()
    begin.focus()
    begin.press("Enter")
    expect(panel.get_by_test_id("state")).to_have_text(re.compile("^serving"))
    expect(panel.get_by_test_id("counts")).to_contain_text("tokens")
    # The line for others: whole, and copied by a click.
    line = panel.get_by_test_id("command")
    expect(line).to_have_text(re.compile(r"^%swarm connect /ip4/.*/p2p/\w{40,} --model [^/]+$"))
    expect(panel.get_by_test_id("reach")).to_contain_text("Only this machine can reach it")
    notebook.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    panel.get_by_test_id("copy").click()
    expect(panel.get_by_test_id("copy")).to_have_text("Copied")
    assert notebook.page.evaluate("navigator.clipboard.readText()") == line.inner_text()
    picture(panel, "serve")
    assert notebook.value("'mine' in [row.name for row in swarm.status().servers]") == "True"
    panel.get_by_test_id("stop").click()
    expect(panel.get_by_test_id("state")).to_have_text("not serving")
