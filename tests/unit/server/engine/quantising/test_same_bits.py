"""Servers on other processors pack the same weights to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_model

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.server.engine.quantising.loading import load_quantised

# Without vector instructions sums are taken in another order.
OTHER = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}


def packing(folder: str) -> str:
    _, told = load_quantised(resolve(folder), 0, 5, bits=4.5, dtype=torch.bfloat16)
    assert told.packing is not None
    return told.packing.hex()


def test_another_processor_packs_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model("llama", tmp_path, hidden_size=64, intermediate_size=96)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    elsewhere = os.environ | OTHER | {"XDG_CACHE_HOME": str(tmp_path / "there")}
    command = [sys.executable, __file__, str(folder)]
    elsewhere["PYTHONPATH"] = os.pathsep.join(sys.path)
    found = subprocess.run(command, env=elsewhere, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [packing(str(folder))]


if __name__ == "__main__":
    print(packing(sys.argv[1]))
