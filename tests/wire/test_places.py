"""Servers that choose their blocks, on a real network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
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
from support.tiny import build
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
    """What a server wants to be in the end, as soon as it wants to move."""
    move = _thread().run(server._server.better_place())
    return replace(move.options, blocks=move.goal or move.options.blocks)


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
                # Whom it asks to be let in is there.
                assert set(first.initial_peers) <= set(wanted.initial_peers)
                assert not set(third.addresses) & set(wanted.initial_peers)
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


def test_who_keeps_some_blocks_serves_them_all_the_time(tiny_llama: Path, tmp_path: Path) -> None:
    """Nobody else has two of its blocks, and a notebook generates meanwhile."""
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids: Any = torch.arange(3, 12)[None]
    expected = generate(reference, ids).sequences.tolist()
    room = str(3 * block_bytes(reference))
    with ExitStack() as stack:
        started = starter(stack, tiny_llama, tmp_path)
        last = started("last", "--blocks", "3:5")
        peers = last.facts["maddrs"]
        chooser = started("chooser", "--memory", room, "--initial-peers", *peers)
        assert chooser.facts["blocks"] == [0, 3]
        peer_ids = [chooser.facts["peer_id"]]
        with sn.connect(peers, model=tiny_llama) as swarm:
            assert generate(swarm.model, ids).sequences.tolist() == expected
            # Now it is better between the two others.
            started("first", "--blocks", "0:1", "--initial-peers", *peers)
            told = Told(chooser)
            deadline, left = time.monotonic() + PATIENCE, 5
            while left and time.monotonic() < deadline:
                assert generate(swarm.model, ids).sequences.tolist() == expected
                assert not swarm.status().missing
                time.sleep(0.1)  # a gap would last for longer; the servers need the processor, too
                # The server of before leaves some time after the new one is told of.
                left -= chooser.log.read_text().count("left the swarm") == 2
        assert told.blocks == [[1, 3], [1, 4]]
        peer_ids += [facts["peer_id"] for facts in told.facts]
        assert len(set(peer_ids)) == 3
        assert "Traceback" not in chooser.log.read_text()


def test_a_move_takes_no_more_memory_than_was_lent(tmp_path: Path) -> None:
    wide = {"hidden_size": 768, "intermediate_size": 4096}
    model = build("llama", **wide).to(torch.bfloat16)
    folder = tmp_path / "wide-llama"
    model.save_pretrained(folder)
    block = block_bytes(model)
    # Half as wide in the file: what a server has of it is no page of that.
    whole = ("--reproducible", "--dtype", "float32", "--bits", "16")
    with ExitStack() as stack:
        started = starter(stack, folder, tmp_path, *whole)
        last = started("last", "--blocks", "3:5")
        peers = last.facts["maddrs"]
        chooser = started("chooser", "--memory", str(3 * block), "--initial-peers", *peers)
        assert chooser.facts["blocks"] == [0, 3]
        held = anonymous_bytes(chooser)
        assert held > 3 * block
        started("first", "--blocks", "0:1", "--initial-peers", *peers)
        told, most, deadline = Told(chooser), 0, time.monotonic() + PATIENCE
        while told.blocks[-1:] != [[1, 4]] and time.monotonic() < deadline:
            most = max(most, anonymous_bytes(chooser))
            time.sleep(0.01)
        assert told.blocks == [[1, 3], [1, 4]]
        # Another daemon's client and another thread take some; three blocks more are 108 MiB.
        assert most - held < block


class Told:
    """What a server says from now on, each place once."""

    def __init__(self, server: ServerProcess):
        self.facts: list[Any] = []
        self._server = server
        Thread(target=self._read, daemon=True).start()

    @property
    def blocks(self) -> list[list[int]]:
        return [facts["blocks"] for facts in self.facts]

    def _read(self) -> None:
        for line in self._server.process.stdout:
            facts = json.loads(line)
            if facts.get("ready") and facts["blocks"] not in self.blocks:
                self.facts.append(facts)


def starter(
    stack: ExitStack, model: Path, place: Path, *options: str
) -> Callable[..., ServerProcess]:
    """What starts servers that look at the swarm often, until the stack is left."""
    options = options or ("--bits", "16", "--dtype", "float32")

    def started(name: str, *more: str) -> ServerProcess:
        arguments = (*more, *options, "--cache-tokens", "4096")
        server = QuickChooser(model, place / f"{name}.log", *arguments)
        stack.callback(server.kill)
        server.wait_ready()
        return server

    return started


def anonymous_bytes(server: ServerProcess) -> int:
    """Memory of a process that is no page of a file."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10
