"""What many of these tests share: servers in this process, up for the whole run.

A notebook's side is connected for the tests of a module. Who changes a server, or a model that
others use, puts it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hosting import HostedSwarm
from support.letter_tokenizer import LetteredPair, add_tokenizer
from support.pairs import SPANS, Pair
from support.tiny import tiny_model

import swarm_notebook as sn


@pytest.fixture(scope="session")
def tiny_peers(tiny_llama: Path) -> Iterator[list[str]]:
    """Two servers of the tiny Llama; notebooks that connect to them share a node."""
    with HostedSwarm(tiny_llama, SPANS) as hosted, hosted.with_a_node() as peers:
        yield peers


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, tiny_peers: list[str]) -> Iterator[Pair]:
    """The tiny Llama, remote and local."""
    with sn.connect(tiny_peers, model=tiny_llama) as swarm:
        yield Pair(swarm, tiny_llama)


@pytest.fixture
def fresh_pair(tiny_llama: Path, tiny_peers: list[str]) -> Iterator[Pair]:
    """The same for one test, which may do with it what it likes."""
    with sn.connect(tiny_peers, model=tiny_llama) as swarm:
        yield Pair(swarm, tiny_llama)


@pytest.fixture(scope="session")
def lettered_swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostedSwarm]:
    """Two servers of the tiny Llama with a tokenizer."""
    folder = add_tokenizer(tiny_model("llama", tmp_path_factory.mktemp("lettered")))
    with HostedSwarm(folder, SPANS) as hosted, hosted.with_a_node():
        yield hosted


@pytest.fixture(scope="module")
def lettered_pair(lettered_swarm: HostedSwarm) -> Iterator[LetteredPair]:
    """The tiny Llama with a tokenizer, remote and local."""
    with sn.connect(lettered_swarm.initial_peers, model=lettered_swarm.model) as swarm:
        yield LetteredPair(swarm, Path(lettered_swarm.model))


@pytest.fixture(scope="session")
def trio(tiny_llama: Path) -> Iterator[HostedSwarm]:
    """Three servers of all blocks of the tiny Llama."""
    with HostedSwarm(tiny_llama, [(0, 5)] * 3) as hosted, hosted.with_a_node():
        yield hosted


@pytest.fixture(scope="module")
def demo(demo_swarm: HostedSwarm) -> Iterator[sn.Swarm]:
    """The demo model over two servers."""
    with sn.connect(demo_swarm.initial_peers, model=demo_swarm.model) as swarm:
        yield swarm
