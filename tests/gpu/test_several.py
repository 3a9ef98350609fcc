"""`serve --gpus all` on a machine with several cards: a server on each, which share the blocks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.patience import PATIENCE
from support.tiny import build, tiny_model
from transformers import AutoModelForCausalLM

import swarm_notebook as sn

CARDS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(CARDS < 2, reason="needs several GPUs")

# What a process takes of a card at least, if it computes on it.
CONTEXT_BYTES = 100 << 20


def free() -> list[int]:
    return [torch.cuda.mem_get_info(card)[0] for card in range(CARDS)]


def test_each_card_has_a_server_with_its_share_of_the_blocks(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, num_hidden_layers=3 * CARDS)
    block: Any = build("llama", num_hidden_layers=1).model.layers[0]
    size = sum(4 * weight.numel() for weight in block.parameters())
    options = [
        "--gpus",
        "all",
        "--bits",
        "16",
        "--dtype",
        "float32",
        "--memory",
        str(7 * size // 2),
    ]
    command = [sys.executable, "-m", "swarm_notebook.cli", "serve", str(model), *options]
    command += ["--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--exit-with-stdin"]
    before = free()
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stderr=log, **pipes) as machine,
    ):
        told: dict[str, dict[str, Any]] = {}
        while sum(one.get("ready", False) for one in told.values()) < CARDS:
            line = machine.stdout.readline()  # type: ignore[union-attr]
            assert line, (tmp_path / "log").read_text()
            facts = json.loads(line)
            told.setdefault(facts["device"], {}).update(facts)
        assert sorted(told) == [f"cuda:{card}" for card in range(CARDS)]
        spans = sorted(tuple(one["blocks"]) for one in told.values())
        assert spans == [(3 * card, 3 * card + 3) for card in range(CARDS)]
        assert all(was - now > CONTEXT_BYTES for was, now in zip(before, free(), strict=True))
        local = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().cuda()
        with sn.connect(told["cuda:0"]["maddrs"], model=model) as swarm:
            ids = torch.arange(3, 40, device=local.device)[None]
            # As many steps as it takes until graphs run.
            asked: Any = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
            assert torch.equal(swarm.model.generate(ids, **asked), local.generate(ids, **asked))
            assert all(one.engine_kind in ("graph", "compiled") for one in swarm.status().servers)
        machine.send_signal(signal.SIGTERM)
        assert machine.wait(PATIENCE) == 0
