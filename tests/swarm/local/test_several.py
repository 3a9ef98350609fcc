"""Servers on several devices of one machine, as real processes; the CPU stands for two."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forkserver import WARM
from support.patience import PATIENCE
from support.tiny import build, tiny_model

import swarm_notebook as sn
from swarm_notebook.net.addresses import LOOPBACK

BLOCKS = 6
DEVICES = ["cpu", "cpu:0"]
PROGRAM = """
import json, sys
from swarm_notebook.local.several import Several
sys.exit(Several(json.loads(sys.argv[1]), json.loads(sys.argv[2])).run())
"""


class Machine:
    """The process that holds them, and what it has told of each."""

    def __init__(self, log: Path, options: dict[str, Any]):
        self.log = log
        given = [json.dumps(DEVICES), json.dumps(options)]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*WARM, PROGRAM, *given],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.facts: dict[str, dict[str, Any]] = {}
        output: Any = self.process.stdout
        while [one.get("ready") for one in self.facts.values()] != [True, True]:
            line = output.readline()
            assert line, log.read_text()
            told = json.loads(line)
            self.facts.setdefault(told["device"], {}).update(told)

    @property
    def pids(self) -> list[int]:
        return [self.facts[device]["pid"] for device in DEVICES]

    def end(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path, num_hidden_layers=BLOCKS)


@pytest.fixture
def machine(model: Path, tmp_path: Path) -> Iterator[Machine]:
    block: Any = build("llama", num_hidden_layers=1).model.layers[0]
    size = sum(4 * weight.numel() for weight in block.parameters())
    options = {"model": str(model), "host_maddrs": LOOPBACK, "bits": 16.0, "dtype": "float32"}
    room = size * BLOCKS // 2 + size // 2
    made = Machine(tmp_path / "log", {**options, "memory": room, "threads": 1})
    yield made
    made.end()


def test_they_share_the_blocks_and_leave_together(machine: Machine, model: Path) -> None:
    spans = sorted(tuple(one["blocks"]) for one in machine.facts.values())
    assert spans == [(0, 3), (3, 6)]
    assert len({one["peer_id"] for one in machine.facts.values()}) == 2
    with sn.connect(machine.facts["cpu"]["maddrs"], model=model) as swarm:
        assert swarm.model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()
    machine.process.send_signal(signal.SIGTERM)
    assert machine.process.wait(PATIENCE) == 0
    for pid in machine.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    log = machine.log.read_text()
    assert all(f"[{device}] " in log for device in DEVICES)


def test_one_that_dies_is_told_and_the_other_goes_on(machine: Machine, model: Path) -> None:
    first, second = machine.pids
    os.kill(first, signal.SIGKILL)
    told = "[cpu] this server has ended with exit code -9: 1 of 2 go on"
    while told not in machine.log.read_text():
        assert machine.process.poll() is None
    os.kill(second, 0)
    machine.process.send_signal(signal.SIGINT)
    assert machine.process.wait(PATIENCE) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)
