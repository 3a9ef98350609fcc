"""One server per family for all tests of training; they start when the first test asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from support.bench import Bench, Benches
from support.raw_wire import RawClient, ServerProcess
from support.tiny import tiny_model

FAMILIES = ("bloom", "gemma3_text", "gpt2", "llama", "qwen3_moe")


@pytest.fixture(scope="session")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Benches]:
    """Servers with small budgets, each with three of its model's blocks."""
    from transformers import AutoModelForCausalLM

    with ExitStack() as stack:

        def start(family: str) -> Bench:
            folder = tiny_model(family, tmp_path_factory.mktemp("models"))
            options = ["--blocks", "1:4", "--activation-bytes", "8MiB"]
            options += ["--adapter-bytes", "4MiB", "--adapter-max-rank", "32"]
            server = ServerProcess(folder, folder.parent / "server.log", *options)
            stack.callback(server.kill)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            server.wait_ready()
            client = RawClient(server.facts["maddrs"])
            stack.callback(client.close)
            return Bench(folder, 1, 4, model.requires_grad_(False), server, client)

        yield Benches(start)


@pytest.fixture(scope="session", params=FAMILIES)
def bench(request: pytest.FixtureRequest, benches: Benches) -> Bench:
    return benches[request.param]


@pytest.fixture(scope="session")
def llama(benches: Benches) -> Bench:
    return benches["llama"]
