"""Notebooks whose processes fork and take signals, as data loaders and multiprocessing do."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest
from support.forkserver import WARM
from support.hosting import HostedSwarm
from support.patience import PATIENCE

TESTS = Path(__file__).parents[2]


def notebook(code: str, tiny_llama: Path, peers: list[str]) -> str:
    """Run code in a process of its own; what it prints."""
    begin = f"""
        import os, signal, sys
        sys.path.append({str(TESTS)!r})
        import torch
        import swarm_notebook as sn
        from support.patience import within
        ids = torch.arange(3, 9)[None]
        swarm = sn.connect({peers!r}, model={str(tiny_llama)!r})
    """
    script = textwrap.dedent(begin) + textwrap.dedent(code)
    done = subprocess.run(
        [*WARM, script],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def peers(tiny_llama: Path):
    with HostedSwarm(tiny_llama, 1) as local:
        yield local.initial_peers


def test_who_takes_sigchld_can_disconnect(tiny_llama: Path, peers: list[str]) -> None:
    code = """
        signal.signal(signal.SIGCHLD, lambda *_: None)
        dataset = torch.utils.data.TensorDataset(ids.repeat(8, 1))
        for (rows,) in torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2):
            swarm.model(rows)
        with within(30):
            swarm.disconnect()
        with sn.connect(swarm.initial_peers, model=swarm.model_name) as again:
            print(again.model(ids).logits.shape[1])
    """
    code = code.replace("swarm.initial_peers", repr(peers))
    code = code.replace("swarm.model_name", repr(str(tiny_llama)))
    assert notebook(code, tiny_llama, peers).split() == ["6"]


def test_a_forked_child_is_told_at_once(tiny_llama: Path, peers: list[str]) -> None:
    code = """
        sys.stdout.flush()
        with within(8):
            child = os.fork()
            if child == 0:
                try:
                    swarm.model(ids)
                except sn.errors.ConnectionFailed as error:
                    print("child:", error, flush=True)
                sys.exit(0)
            os.waitpid(child, 0)
        print(swarm.model(ids).logits.shape[1])
    """
    said = notebook(code, tiny_llama, peers)
    assert "was forked off a notebook" in said
    assert "spawned" in said
    assert said.split()[-1] == "6"
