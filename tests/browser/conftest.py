"""One Lab server, one browser, and one notebook with a kernel and a swarm, for all browser tests.

Every test adds its cells at the end of the same notebook, as a person does in a long session. What
the screen showed is kept in build/browser/, light and dark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from browser.chromium import chromium
from browser.lab import Lab, jupyter_lab
from browser.notebook import Notebook
from playwright.sync_api import Browser, Locator, expect

DESK = pytest.StashKey["Notebook"]()
PACKAGES = Path(__file__).parents[2] / "js" / "node_modules"
AXE = PACKAGES / "axe-core" / "axe.min.js"
LOOK = """async (part) => {
  const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"];
  const { violations } = await window.axe.run(part, { runOnly: { type: "tag", values: tags } });
  return violations.flatMap(({ id, help, nodes }) =>
    nodes.map(({ html, failureSummary }) => `${id}: ${help}: ${html}: ${failureSummary}`));
}"""
SCREENS = Path(__file__).parents[2] / "build" / "browser"


def faults(part: Locator) -> list[str]:
    """What axe-core finds that a part of the screen keeps from people, by WCAG 2.1 A and AA.

    Without Node, and so without any of npm's packages, nothing is looked at.
    """
    if not PACKAGES.exists():
        return []
    part.page.evaluate(f"window.axe ?? (() => {{ {AXE.read_text('utf-8')} }})()")
    found: list[str] = part.evaluate(LOOK)
    return found


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with jupyter_lab(tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@contextmanager
def opened(lab: Lab, browser: Browser, name: str) -> Iterator[Notebook]:
    """A notebook of the Lab server's folder in a window of its own; its kernel ends with it."""
    # What pulses and flows would take half a core, where no card draws it.
    with browser.new_context(reduced_motion="reduce") as window:
        notebook = Notebook(window.new_page(), lab.folder / name)
        notebook.open(lab.address(name))
        yield notebook
        notebook.shut_down()


@pytest.fixture
def open_notebook(lab: Lab, browser: Browser) -> Iterator[Callable[[str], Notebook]]:
    """Opens another notebook, for the test."""
    with ExitStack() as windows:
        yield lambda name: windows.enter_context(opened(lab, browser, name))


@pytest.fixture(scope="session")
def notebook(request: pytest.FixtureRequest, lab: Lab, browser: Browser) -> Iterator[Notebook]:
    """Connected to an embedded swarm of the demo model: ``local`` and ``swarm``."""
    with opened(lab, browser, "desk.ipynb") as desk:
        request.session.stash[DESK] = desk
        _connect(desk)
        yield desk


def _connect(opened: Notebook) -> None:
    opened.run("%load_ext swarm_notebook")
    opened.run(
        "import swarm_notebook as sn\n"
        "local = sn.LocalSwarm(servers=[(0, 15), (15, 30), (15, 30)], threads=1)\n"
        "swarm = sn.connect(local.initial_peers, model=local.model)\n"
        "model, tokenizer = swarm.model, swarm.tokenizer",
    )


@pytest.fixture(scope="module", autouse=True)
def _outputs_go_with_their_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Live views of all files that went before would take the browser's time."""
    yield
    opened: Notebook | None = request.session.stash.get(DESK, None)
    if opened is not None:
        opened.command("notebook:clear-all-cell-outputs")
        expect(opened.page.locator(".jp-OutputArea-output")).to_have_count(0)


@pytest.fixture(autouse=True)
def _what_was_seen(request: pytest.FixtureRequest) -> Iterator[None]:
    """The screen as it was when a test failed."""
    failed = request.session.testsfailed
    yield
    opened: Notebook | None = request.session.stash.get(DESK, None)
    if request.session.testsfailed > failed and opened is not None:
        SCREENS.mkdir(parents=True, exist_ok=True)
        opened.page.screenshot(path=SCREENS / f"failed-{request.node.name}.png")


@pytest.fixture
def picture(notebook: Notebook) -> Callable[[Locator, str], None]:
    """Keeps what a part of the screen looks like, in both themes, each of which axe looks at.

    It leaves the other theme: to change it takes Lab some seconds.
    """
    SCREENS.mkdir(parents=True, exist_ok=True)

    def take(part: Locator, name: str) -> None:
        shown = notebook.dark
        for dark in (shown, not shown):
            notebook.theme(dark)
            assert faults(part) == []
            part.screenshot(path=SCREENS / f"{name}-{'dark' if dark else 'light'}.png")

    return take
