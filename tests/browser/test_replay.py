"""The site's page that replays a recorded session: the widgets' own scripts, and no kernel."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser.conftest import faults
from playwright.sync_api import Browser, Page, expect

FOLDER = Path(__file__).parents[2] / "docs" / "replay"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """The page as the site serves it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=FOLDER))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with browser.new_context() as window:
            opened = window.new_page()
            errors: list[str] = []
            opened.on("pageerror", lambda error: errors.append(str(error)))
            opened.goto(f"http://127.0.0.1:{server.server_port}/session.html")
            yield opened
            assert not errors
    finally:
        server.shutdown()
        server.server_close()


def test_a_visitor_touches_the_map_the_text_and_the_lens(page: Page) -> None:
    map_, text, lens = (page.get_by_test_id(name) for name in ("map", "generate", "lens"))
    map_.get_by_test_id("server").first.click()
    expect(map_.get_by_test_id("detail")).to_contain_text("blocks 0:15 have no other server")

    text.get_by_test_id("run").click()
    expect(map_.get_by_test_id("failover")).to_contain_text("continued on")
    expect(text.get_by_test_id("stats")).to_contain_text("1 server lost and replaced")
    expect(text.get_by_test_id("run")).to_be_enabled()
    count = text.get_by_test_id("token").count()
    assert count > 40

    text.get_by_test_id("token").first.hover()
    text.get_by_test_id("alternative").nth(1).click()
    expect(text.get_by_label("text 2 of 2")).to_be_visible()
    expect(text.get_by_test_id("origin")).to_have_text("branched from text 1 at token 1")
    text.get_by_role("button", name="Previous text").click()
    expect(text.get_by_test_id("token")).to_have_count(count)

    lens.get_by_role("gridcell").filter(has_text="·Paris").first.hover()
    lens.get_by_test_id("details").get_by_role("button", name="·Paris").click()
    expect(lens.get_by_label("Colour")).to_have_value("rank")
    text.get_by_test_id("prompt").fill("What nobody has recorded")
    text.get_by_test_id("run").click()
    expect(page.get_by_role("status").last).to_contain_text("only one prompt was recorded")
    assert faults(page.locator("body")) == []
