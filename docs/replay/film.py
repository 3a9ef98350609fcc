"""Film the replayed session for the first page and the README: a text, and a server killed in it.

The browser of the tests shows ``session.html``, presses Run and takes a picture of the map and the
text a few times a second; in light and in dark they become ``docs/session-*.webp``.
"""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from browser.chromium import chromium

HERE = Path(__file__).parent
WIDTH, HEIGHT = 860, 620
PERIOD = 0.2  # seconds between pictures
LAST_MS = 3000  # for which the end is shown before it begins anew
MOST_BYTES = 1_000_000  # a README's picture
# Only what is filmed, and nothing that a visitor would press.
SHOWN = """
  #lens, p { display: none; }
  .sn-generate .sn-controls, .sn-generate .sn-history { display: none; }
  .sn-legend, .sn-cost { display: none; }
"""


def film(browser: Browser, address: str, seconds: float, *, dark: bool) -> Path:
    """One film."""
    theme = "dark" if dark else "light"
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=theme)
    page.goto(address)
    page.add_style_tag(content=SHOWN)
    page.get_by_test_id("run").click()
    pictures, times, began = [], [], time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        pictures.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        times.append(now)
        time.sleep(max(0.0, PERIOD - (time.monotonic() - began - now)))
    page.close()
    lasting = [round(1000 * (after - at)) for at, after in pairwise(times)]
    path = HERE.parent / f"session-{theme}.webp"
    first, *rest = pictures
    first.save(
        path,
        save_all=True,
        append_images=rest,
        duration=[*lasting, LAST_MS],
        loop=0,
        quality=60,
        method=6,
    )
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, the limit is {MOST_BYTES}")
    return path


def main() -> None:
    recording = json.loads((HERE / "recording.json").read_text(encoding="utf-8"))
    tracks = (recording["widgets"][name]["frames"] for name in ("map", "generate"))
    seconds = max(frames[-1][0] for frames in tracks) / 1000
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=HERE)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with chromium() as browser:
        for dark in (False, True):
            film(browser, f"http://127.0.0.1:{server.server_port}/session.html", seconds, dark=dark)
    server.shutdown()


if __name__ == "__main__":
    main()
