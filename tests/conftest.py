"""Swarms for tests, and a watch that no test leaves a process behind.

Servers run for real, as child processes, one thread each. Every process that a test starts inherits
a mark in its environment; a test that ends with more marked processes than it began with fails.
Swarms of module or session scope are there before a test begins, so they do not count against it;
those in `shared` may even be killed and started again by a test.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import shared
from tiny import tiny_model

from swarm_notebook import LocalSwarm

if TYPE_CHECKING:
    from scene import Scene

MARK = "SWARM_NOTEBOOK_TEST_RUN"
GRACE_SECONDS = 5.0

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test depends on what the Hub has today
os.environ[MARK] = uuid.uuid4().hex


def marked_processes() -> dict[int, str]:
    """Servers and network daemons that this test run started and that still live."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.pid == os.getpid() or process.environ().get(MARK) != os.environ[MARK]:
                continue
            command = " ".join(process.info["cmdline"] or ())
            if process.status() != psutil.STATUS_ZOMBIE and _ours(command):
                found[process.pid] = command
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _ours(command: str) -> bool:
    return any(name in command for name in ("swarm_notebook.cli", "swarm-notebook", "p2pd"))


def wait_gone(known: dict[int, str], seconds: float = GRACE_SECONDS) -> dict[int, str]:
    """Marked processes that are not `known` and do not go away within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        ours = known.keys() | shared.processes()
        left = {pid: text for pid, text in marked_processes().items() if pid not in ours}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _fail_on(left: dict[int, str], when: str) -> None:
    for pid in left:
        psutil.Process(pid).kill()
    if left:
        listed = "\n".join(f"  {pid}: {text[:150]}" for pid, text in left.items())
        pytest.fail(f"{when} left processes behind:\n{listed}")


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_run() -> Iterator[None]:
    yield
    _fail_on(wait_gone({}), "the test run")


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    known = marked_processes()
    yield
    _fail_on(wait_gone(known), request.node.nodeid)


@pytest.fixture(scope="session")
def demo_swarm() -> Iterator[LocalSwarm]:
    """Two servers with half of the demo model each, for the whole run. Do not kill them."""
    with LocalSwarm(threads=1) as local:
        yield local


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with five blocks; it has no tokenizer."""
    return tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_scene(tiny_llama: Path) -> Iterator[Scene]:
    """Two servers of the tiny Llama, connected, for the whole run. Do not kill them."""
    from scene import scene  # imports transformers

    with scene(tiny_llama, [(0, 2), (2, 5)]) as made:
        yield made


@pytest.fixture
def tiny_swarm(tiny_llama: Path) -> Iterator[Callable[..., LocalSwarm]]:
    """Starts swarms of the tiny Llama; they end with the test."""
    with ExitStack() as swarms:

        def start(servers: Any = 2, **options: Any) -> LocalSwarm:
            options = {"threads": 1, **options}
            return swarms.enter_context(LocalSwarm(tiny_llama, servers, **options))

        yield start
