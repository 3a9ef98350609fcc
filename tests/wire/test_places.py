"""Servers that choose their blocks, on a real network."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from support.forkserver import WARM
from support.hosting import HostedServer, HostedSwarm, _thread
from support.patience import PATIENCE, wait_until
from support.raw_wire import ServerProcess
from support.scene import generate
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.errors import Unsupported
from swarm_notebook.server.engine import throughput
from swarm_notebook.server.options import ServeOptions
from swarm_notebook.server.presence import placing


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "LOOK_SECONDS", 0.5)
    # As fast as each other, whatever else the machine does.
    monkeypatch.setattr(throughput.Throughput, "of_span", lambda *_: 100.0)


def moved(server: HostedServer) -> ServeOptions:
    """What a server wants to be, as soon as it wants to move."""
    move = _thread().run(server._server.better_place())
    return move.options


QUICK_CHOOSER = """
from swarm_notebook.cli import main
from swarm_notebook.server.engine import throughput
from swarm_notebook.server.presence import placing
placing.LOOK_SECONDS = 0.5
throughput.Throughput.of_span = lambda *_: 100.0
main()
"""


class QuickChooser(ServerProcess):
    """A server process that looks at the swarm often, and announces what the others do."""

    program = (*WARM[1:], QUICK_CHOOSER)


def block_bytes(model: Any) -> int:
    """What the largest block takes in float32."""
    return max(sum(one.numel() for one in layer.parameters()) * 4 for layer in model.model.layers)


def test_servers_take_what_is_missing_and_move_when_that_changes(tiny_llama: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    block = block_bytes(reference)
    ids: Any = torch.arange(3, 12)[None]
    expected = generate(reference, ids).sequences.tolist()
    with HostedSwarm(tiny_llama, [(0, 3)]) as first:
        whole = {"bits": 16, "dtype": "float32"}
        free = {"initial_peers": first.initial_peers, "cache_tokens": 512, **whole}
        second = HostedServer(ServeOptions(tiny_llama, memory=2 * block, name="second", **free))
        with (
            HostedServer(ServeOptions(tiny_llama, memory=3 * block, name="third", **free)) as third,
            second,
        ):
            # The third came first: it took all that it could of what nobody had.
            assert third.blocks == (2, 5)
            with sn.connect(first.initial_peers, model=tiny_llama) as swarm:
                assert generate(swarm.model, ids).sequences.tolist() == expected
                assert second.blocks == (0, 2)
                _thread().run(third.stop())
                # Its blocks are nobody's now; the second is not alone where it is.
                wanted = moved(second)
                assert wanted.blocks == (3, 5)
                # Whoever it was told of at first may be gone by now.
                assert set(first.initial_peers) < set(wanted.initial_peers)
                _thread().run(second.stop())
                with HostedServer(wanted) as again:
                    assert again.blocks == (3, 5)
                    wait_until(lambda: not swarm.status().missing)
                    assert generate(swarm.model, ids).sequences.tolist() == expected


def test_what_has_room_for_no_block_says_so(tiny_llama: Path) -> None:
    with HostedSwarm(tiny_llama, [(0, 3)]) as first:
        small = ServeOptions(tiny_llama, None, first.initial_peers, memory=100)
        with pytest.raises(Unsupported, match="--memory"), HostedServer(small):
            pass


def test_who_begins_a_swarm_keeps_to_its_memory_too(tiny_llama: Path) -> None:
    room = 2 * block_bytes(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    with HostedServer(
        ServeOptions(tiny_llama, memory=room, bits=16, dtype="float32", cache_tokens=512)
    ) as first:
        assert first.blocks == (0, 2)


def test_who_began_a_swarm_finds_it_again_after_a_move(tiny_llama: Path) -> None:
    """It was told of nobody, and would begin another one."""
    block = block_bytes(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    whole = {"bits": 16, "dtype": "float32", "cache_tokens": 512}
    began = ServeOptions(tiny_llama, memory=3 * block, name="first", **whole)
    with HostedServer(began) as first:
        assert first.blocks == (0, 3)
        there = ServeOptions(tiny_llama, (0, 3), first.addresses, name="second", **whole)
        with HostedServer(there) as second:
            wanted = moved(first)
            assert wanted.blocks == (2, 5)
            _thread().run(first.stop())
            with HostedServer(wanted) as again:
                assert second.peer_id in again.acquaintances()
                with sn.connect(second.addresses, model=tiny_llama) as swarm:
                    assert not swarm.status().missing


def test_who_has_room_for_both_serves_until_it_does_elsewhere(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Nobody else has two of its blocks, and a notebook generates meanwhile."""
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids: Any = torch.arange(3, 12)[None]
    expected = generate(reference, ids).sequences.tolist()
    room = str(3 * block_bytes(reference))
    whole = ("--bits", "16", "--dtype", "float32", "--cache-tokens", "4096")
    with ExitStack() as stack:

        def started(name: str, *options: str) -> ServerProcess:
            server = QuickChooser(tiny_llama, tmp_path / f"{name}.log", *options, *whole)
            stack.callback(server.kill)
            server.wait_ready()
            return server

        last = started("last", "--blocks", "3:5")
        peers = last.facts["maddrs"]
        chooser = started("chooser", "--memory", room, "--initial-peers", *peers)
        assert chooser.facts["blocks"] == [0, 3]
        before = chooser.facts["peer_id"]
        told: list[Any] = []
        with sn.connect(peers, model=tiny_llama) as swarm:
            assert generate(swarm.model, ids).sequences.tolist() == expected
            # Now it is better between the two others.
            started("first", "--blocks", "0:1", "--initial-peers", *peers)
            read = chooser.process.stdout.readline
            reading = Thread(target=lambda: told.append(json.loads(read())), daemon=True)
            reading.start()
            deadline, left = time.monotonic() + PATIENCE, 5
            while left and time.monotonic() < deadline:
                assert generate(swarm.model, ids).sequences.tolist() == expected
                assert not swarm.status().missing
                # The server of before leaves some time after the new one is told of.
                left -= "left the swarm" in chooser.log.read_text()
            reading.join(PATIENCE)
        (facts,) = told
        assert facts["ready"]
        assert facts["blocks"] == [1, 4]
        assert facts["peer_id"] != before
        assert "Traceback" not in chooser.log.read_text()
