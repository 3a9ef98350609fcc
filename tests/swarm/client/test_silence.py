"""All servers are silent for so long that nothing is left of them in the DHT, and come back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support.forkserver import WARM
from support.patience import wait_until
from support.raw_wire import ServerProcess
from support.scene import generate
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.errors import ConnectionFailed, MissingBlocks

# Announced every five seconds, so that records expire after ten.
PROGRAM = """
from swarm_notebook.cli import main
from swarm_notebook.server import app
from swarm_notebook.server.presence import announce

class Hasty(announce.Announcer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._period = 5.0

app.Announcer = Hasty
main()
"""


class HastyServer(ServerProcess):
    program = (*WARM[1:], PROGRAM)

    def signal(self, number: int) -> None:
        """To the server and its daemon, which are one group."""
        os.killpg(self.process.pid, number)


@pytest.fixture(scope="module")
def servers(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[HastyServer]]:
    place = tmp_path_factory.mktemp("silence")
    with ExitStack() as stack:
        started: list[HastyServer] = []
        for number, blocks in enumerate(("0:3", "3:5")):
            options = ["--blocks", blocks]
            if started:
                options += ["--initial-peers", *started[0].facts["maddrs"]]
            server = HastyServer(tiny_llama, place / f"{number}.log", *options)
            stack.callback(server.kill)
            server.wait_listening()
            started.append(server)
        for server in started:
            server.wait_ready()
        yield started


def test_a_fresh_notebook_says_who_has_the_blocks_that_it_misses(
    servers: list[HastyServer], tiny_llama: Path
) -> None:
    servers[1].signal(signal.SIGSTOP)
    try:
        with pytest.raises(MissingBlocks, match=r"blocks 3:5; .* \(unreachable\): it does not ans"):
            sn.connect(servers[0].facts["maddrs"], model=tiny_llama, timeout=4)
    finally:
        servers[1].signal(signal.SIGCONT)


def test_silence_is_not_taken_for_a_swarm_without_the_model(
    servers: list[HastyServer], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody says anything once the notebook has joined."""
    start = Directory.start

    async def fall_silent_and_start(self: Directory) -> None:
        for server in servers:
            server.signal(signal.SIGSTOP)
        await start(self)

    monkeypatch.setattr(Directory, "start", fall_silent_and_start)
    try:
        with pytest.raises(ConnectionFailed, match="no peer of this swarm has answered for 5 s"):
            sn.connect(servers[0].facts["maddrs"], model=tiny_llama, timeout=5)
    finally:
        for server in servers:
            server.signal(signal.SIGCONT)


def test_a_notebook_that_heard_nobody_goes_on(servers: list[HastyServer], tiny_llama: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids = torch.arange(3, 9)[None]
    expected = generate(reference, ids).sequences.tolist()
    with sn.connect(servers[0].facts["maddrs"], model=tiny_llama) as swarm:
        assert generate(swarm.model, ids).sequences.tolist() == expected
        for server in servers:
            server.signal(signal.SIGSTOP)
        try:
            directory = swarm.connection.directory
            wait_until(lambda: not directory.snapshot.spans)  # all records have expired
        finally:
            for server in servers:
                server.signal(signal.SIGCONT)
        began = time.monotonic()
        assert generate(swarm.model, ids).sequences.tolist() == expected
        print(f"back after {time.monotonic() - began:.1f} s")
