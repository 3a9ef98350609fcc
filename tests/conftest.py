"""Swarms for tests, and a watch that no test leaves a process behind.

Servers run for real: in this process (`support.hosting`), or as child processes where a test is
about processes; always with one thread each for torch. Every process that a test starts inherits a
mark in its environment; a test that ends with more marked processes than it began with fails.
Swarms of module or session scope are there before a test begins, so they do not count against it;
those in `lasting_swarms` may even be killed and started again by a test.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from support import forkserver
from support.processes import mark_this_run, wait_gone

from swarm_notebook import LocalSwarm

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell
    from support.hosting import HostedSwarm
    from support.letter_tokenizer import Lettered
    from support.scene import Scene

# Before torch is imported, which is why the fixtures import what they need themselves.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test depends on what the Hub has today
mark_this_run()
forkserver.install()


def _fail_on(left: dict[int, str], when: str) -> None:
    for pid in left:
        psutil.Process(pid).kill()
    if left:
        listed = "\n".join(f"  {pid}: {text[:150]}" for pid, text in left.items())
        pytest.fail(f"{when} left processes behind:\n{listed}")


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_run() -> Iterator[None]:
    yield
    _fail_on(wait_gone(()), "the test run")


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    if _folder(request.node) == "unit":  # no servers there: the end of the run is early enough
        yield
        return
    known = psutil.pids()
    yield
    _fail_on(wait_gone(known), request.node.nodeid)


@pytest.fixture(scope="session")
def demo_swarm() -> Iterator[HostedSwarm]:
    """Two servers with half of the demo model each, for the whole run."""
    from support.hosting import HostedSwarm

    with HostedSwarm() as hosted, hosted.with_a_node():
        yield hosted


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with five blocks; it has no tokenizer."""
    from support.tiny import tiny_model

    return tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_scene(tiny_llama: Path) -> Iterator[Scene]:
    """Two servers of the tiny Llama, connected, for the whole run."""
    from support.scene import scene

    with scene(tiny_llama, [(0, 2), (2, 5)], hosted=True) as made:
        yield made


@pytest.fixture
def tiny_swarm(tiny_llama: Path) -> Iterator[Callable[..., LocalSwarm]]:
    """Starts swarms of the tiny Llama; they end with the test."""
    with ExitStack() as swarms:

        def start(servers: Any = 2, **options: Any) -> LocalSwarm:
            options = {"threads": 1, **options}
            return swarms.enter_context(LocalSwarm(tiny_llama, servers, **options))

        yield start


@pytest.fixture(scope="session")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> Lettered:
    """The tiny Llama with a tokenizer, held locally."""
    from support.letter_tokenizer import lettered_model

    return lettered_model(tmp_path_factory.mktemp("lettered"))


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """With the extension in it."""
    from IPython.core.interactiveshell import InteractiveShell

    from swarm_notebook.notebook.magics import load, unload

    made = InteractiveShell()
    load(made)
    yield made
    unload(made)


# In the order in which they run: where several processes share a run file by file, long files come
# first. The browser's come last: where Playwright's loop runs, no other test can run its own.
FOLDERS = ("swarm", "wire", "notebook", "gpu", "unit", "browser")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test carries the name of its folder as a mark, and runs in the order of the folders.

    One that is marked as slow carries no other mark, and runs first.
    """
    for item in items:
        if _place(item) >= 0:
            item.add_marker(_folder(item))
    items.sort(key=_place)


def pytest_collection_finish() -> None:
    """Leave what was imported for the tests out of their garbage collections, 0.2 s each."""
    gc.collect()
    gc.freeze()


def _place(item: pytest.Item) -> int:
    slow = item.get_closest_marker("slow") is not None
    return FOLDERS.index(_folder(item)) if _folder(item) in FOLDERS and not slow else -1


def _folder(item: pytest.Item) -> str:
    """The folder of these tests that it is in; of example notebooks, which run first, none."""
    here = Path(__file__).parent
    return item.path.relative_to(here).parts[0] if here in item.path.parents else ""
