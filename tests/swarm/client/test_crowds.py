"""Ten notebooks, each a peer of its own, over chains of servers that are equal."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier

import pytest
import torch
from support.hosting import HostedSwarm
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.server.engine import throughput

NOTEBOOKS, CHAINS = 10, 3
HALVES = [(0, 3), (3, 5)]


@pytest.fixture
def equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers find themselves equally fast, and so slow that nothing is decided by round trips."""
    measured = throughput.Throughput(1.0, 1.0)
    monkeypatch.setattr(throughput, "measure", lambda *_: measured)


def subsets(addresses: list[str]) -> Iterator[list[str]]:
    """Different ones: notebooks of this process that join by the same addresses are one peer."""
    for count in range(1, len(addresses) + 1):
        yield from map(list, itertools.combinations(addresses, count))


def test_ten_notebooks_that_generate_together_spread(tiny_llama: Path, equal: None) -> None:
    ids = torch.arange(3, 9)[None]
    local = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    expected = local.generate(ids, max_new_tokens=12, do_sample=False)
    with ExitStack() as stack:
        hosted = stack.enter_context(HostedSwarm(tiny_llama, HALVES * CHAINS))
        ways = itertools.islice(subsets([one.addresses[0] for one in hosted.servers]), NOTEBOOKS)
        notebooks = [stack.enter_context(sn.connect(way, model=tiny_llama)) for way in ways]
        together = Barrier(NOTEBOOKS)

        def work(notebook: sn.Swarm) -> torch.Tensor:
            together.wait()
            found: torch.Tensor = notebook.model.generate(ids, max_new_tokens=12, do_sample=False)
            return found

        with ThreadPoolExecutor(NOTEBOOKS) as threads:
            for found in threads.map(work, notebooks):
                assert torch.equal(found, expected)
        sessions = Counter({one.name: one.sessions_served for one in hosted.servers})
        assert sum(sessions.values()) == len(HALVES) * NOTEBOOKS
        # Somebody else may have been numbered between two of them.
        assert max(sessions.values()) <= -(-NOTEBOOKS // CHAINS) + 1, sessions
