"""One server per family for all tests of training; they start when the first test asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.bench import Bench, Benches, bench_of
from support.hosting import HostedServer
from support.raw_wire import ServerProcess
from support.tiny import tiny_model

from swarm_notebook.server.options import ServeOptions

FAMILIES = ("bloom", "gemma3_text", "gpt2", "llama", "qwen3_moe")
# Small enough for a test to fill.
ACTIVATION_BYTES, ADAPTER_BYTES = 8 << 20, 4 << 20


@pytest.fixture(scope="session")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Benches]:
    """Servers with small budgets, each with three of its model's blocks."""
    with ExitStack() as stack:

        def start(family: str) -> Bench:
            folder = tiny_model(family, tmp_path_factory.mktemp("models"))
            options = ServeOptions(
                folder,
                (1, 4),
                activation_bytes=ACTIVATION_BYTES,
                adapter_bytes=ADAPTER_BYTES,
            )
            server = stack.enter_context(HostedServer(options))
            return stack.enter_context(bench_of(folder, 1, 4, server))

        yield Benches(start)


@pytest.fixture(scope="session", params=FAMILIES)
def bench(request: pytest.FixtureRequest, benches: Benches) -> Bench:
    return benches[request.param]


@pytest.fixture(scope="session")
def llama(benches: Benches) -> Bench:
    return benches["llama"]


@pytest.fixture
def llama_process(tmp_path: Path) -> Iterator[Bench]:
    """As `llama`, in a process of its own, whose memory is the server's alone."""
    options = ["--blocks", "1:4", "--activation-bytes", str(ACTIVATION_BYTES)]
    options += ["--adapter-bytes", str(ADAPTER_BYTES)]
    folder = tiny_model("llama", tmp_path)
    server = ServerProcess(folder, tmp_path / "server.log", *options)
    try:
        server.wait_ready()
        with bench_of(folder, 1, 4, server) as bench:
            yield bench
    finally:
        server.kill()
