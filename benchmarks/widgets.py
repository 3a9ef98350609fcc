"""What the widgets cost: from a token to its paint, per token in the kernel, per update of a map.

    python benchmarks/widgets.py

JupyterLab in headless Chromium, a real kernel, the demo model over two servers of this machine.
Prints one JSON object:

- ``token_to_paint_ms``: from the moment at which the notebook has a token to the first frame after
  the browser's page has it; median and 90th percentile.
- ``kernel_main_thread_ms_per_token``: CPU time of the kernel's main thread while a widget writes
  and the map is shown, less that of an idle kernel for as long.
- ``map_update``: a swarm of 100 servers and 126 blocks, all of whose round trips have changed:
  milliseconds in Python, in the browser (script and layout), and the bytes between them.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from browser.chromium import chromium
from browser.lab import jupyter_lab
from browser.notebook import Notebook
from common import say
from map import BLOCKS, SERVERS, crowd, read, shown_of
from playwright.sync_api import Browser

TOKENS = 60
UPDATES = 40

CONNECT = """
import json, threading, time
import swarm_notebook as sn
from swarm_notebook.widgets import GenerateWidget, SwarmMap
local = sn.LocalSwarm(threads=1)
swarm = sn.connect(local.initial_peers, model=local.model)
"""
# The writer says that its text has grown as soon as it has a token.
WRITER = f"""
widget = GenerateWidget(swarm, "Once upon a time", max_new_tokens={TOKENS})
arrived, tell = [], widget.writer._on_change
def note():
    while len(arrived) < len(widget.tokens):
        arrived.append(time.time())
    tell()
widget.writer._on_change = note
widget
"""
# The moment of the frame after the one in which the page has so many tokens.
WATCH = """() => {
  window.painted = [];
  const text = document.querySelector('[data-testid="text"]');
  new MutationObserver(() => {
    const count = text.querySelectorAll('[data-testid="token"]').length;
    requestAnimationFrame(() => setTimeout(() => {
      const now = (performance.timeOrigin + performance.now()) / 1000;
      while (window.painted.length < count) window.painted.push(now);
    }));
  }).observe(text, { childList: true, subtree: true });
}"""
CPU = """
clock = time.pthread_getcpuclockid(threading.main_thread().ident)
found = {}
def measure():
    arrived.clear()
    before, began = time.clock_gettime(clock), time.monotonic()
    widget.run()
    widget.wait()
    middle, lasted = time.clock_gettime(clock), time.monotonic() - began
    time.sleep(lasted)
    found["busy"], found["idle"] = middle - before, time.clock_gettime(clock) - middle
    found["tokens"] = len(widget.tokens)
worker = threading.Thread(target=measure)
worker.start()
"""
# A view of the map alone on a page, with the front end's side of a widget.
PAGE = """async ([script, style, traits]) => {
  document.head.append(Object.assign(document.createElement("style"), { textContent: style }));
  const url = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  const { default: widget } = await import(url);
  const listeners = {};
  window.model = {
    get: (name) => traits[name],
    set: (name, value) => { traits[name] = value; },
    save_changes() {}, send() {}, off() {},
    on: (event, listener) => (listeners[event] ??= []).push(listener),
  };
  const el = document.createElement("div");
  document.body.append(el);
  widget.render({ model: window.model, el });
  window.update = (values) => {
    const began = performance.now();
    Object.assign(traits, values);
    for (const name of Object.keys(values)) {
      for (const listener of listeners[`change:${name}`] ?? []) listener();
    }
    el.getBoundingClientRect();
    return performance.now() - began;
  };
}"""


def tokens(browser: Browser, folder: Path) -> dict[str, Any]:
    """Tokens on their way to the page, and the main thread's part in it."""
    with jupyter_lab(folder) as lab:
        notebook = Notebook(browser.new_page(), lab.folder / "bench.ipynb")
        notebook.open(lab.address("bench.ipynb"))
        notebook.run(CONNECT)
        notebook.run("SwarmMap(swarm)")
        notebook.run(WRITER)
        notebook.run("widget.run(); widget.wait()")  # warm-up
        notebook.page.evaluate(WATCH)
        # The view empties the text of the warm-up before the first token comes.
        notebook.run("arrived.clear(); widget.run(); time.sleep(0.05)")
        notebook.page.evaluate("() => { window.painted = []; }")
        notebook.run("widget.wait(); time.sleep(1)")
        arrived = json.loads(notebook.value("json.dumps(arrived)").strip("'"))
        painted = notebook.page.evaluate("() => window.painted")
        delays = sorted(
            1000 * (shown - came) for came, shown in zip(arrived, painted, strict=False)
        )
        notebook.run(CPU)
        notebook.run("worker.join()")
        cpu = json.loads(notebook.value("json.dumps(found)").strip("'"))
    return {
        "token_to_paint_ms": {
            "tokens": len(delays),
            "median": round(statistics.median(delays), 1),
            "p90": round(delays[int(0.9 * len(delays))], 1),
        },
        "kernel_main_thread_ms_per_token": round(
            1000 * (cpu["busy"] - cpu["idle"]) / cpu["tokens"], 3
        ),
    }


def map_update(browser: Browser) -> dict[str, Any]:
    """A whole new state of a large swarm, through the map's own Python and JavaScript."""
    directory = crowd()
    shown = shown_of(directory)
    traits = {name: shown.get_state()[name] for name in shown.keys if not name.startswith("_")}
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.evaluate(PAGE, [shown._esm, shown._css, traits])
    sent: list[dict[str, Any]] = []
    shown._send = lambda message, **_: sent.append(message["state"])
    python, script, size = [], [], []
    for _ in range(UPDATES):
        sent.clear()
        read(directory)
        began = time.perf_counter()
        shown._tell_facts()
        python.append(1000 * (time.perf_counter() - began))
        state = {name: value for one in sent for name, value in one.items()}
        size.append(len(json.dumps(state)))
        script.append(page.evaluate("(values) => window.update(values)", state))
    shown.close()
    return {
        "servers": SERVERS,
        "blocks": BLOCKS,
        "python_ms": round(statistics.median(python), 2),
        "browser_ms": round(statistics.median(script), 2),
        "bytes": round(statistics.median(size)),
    }


def main() -> None:
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        say("a map of a large swarm …")
        found: dict[str, Any] = {"map_update": map_update(browser)}
        say("tokens to a browser …")
        found |= tokens(browser, Path(folder) / "lab")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
