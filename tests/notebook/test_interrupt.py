"""Interrupts (contract C5): at once, the servers stop and forget, the model stays usable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forkserver import WARM
from support.hosting import HostedSwarm
from support.kernel import Kernel
from support.patience import PATIENCE, within
from support.tiny import tiny_config
from transformers import AutoModelForCausalLM

# The contract says 0.5 s; a machine that runs other tests meanwhile gets a margin.
INTERRUPT_SECONDS = 1.5
FREE_SECONDS = 5.0
NEW_TOKENS = 12

SETUP = """
import time, torch
import swarm_notebook as sn

swarm = sn.connect({peers!r}, model={folder!r})
model, directory = swarm.model, swarm.connection.directory
ids = torch.arange(3, 12)[None]


def sessions():
    peers = [hop.peer_id for hop in swarm.route().hops]
    return sum(swarm.info(peer)["sessions"] for peer in peers)


def wait_until_free():
    while sessions():
        time.sleep(0.02)


def one_block():
    return model.model.layers[1](torch.ones(1, 3, 48))


def answer():
    torch.testing.assert_close(one_block(), block_before)
    return model.generate(ids, max_new_tokens={new}, do_sample=False).tolist()


block_before = one_block()
"""

SLOW = {
    "generate": "model.generate(ids, max_new_tokens=9000, min_new_tokens=9000, do_sample=False)",
    "beams": "model.generate(ids, max_new_tokens=9000, min_new_tokens=9000, num_beams=3)",
    "forward": "model(torch.arange(3, 103).repeat(8, 20))",
    "prefill": "model(torch.arange(3, 103).repeat(8, 20), use_cache=True)",
}


@pytest.fixture(scope="module")
def slow_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, but with many blocks and a context for long generations."""
    config = tiny_config("llama")
    config.num_hidden_layers, config.max_position_embeddings = 12, 1 << 14
    folder = tmp_path_factory.mktemp("slow") / "slow-llama"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def setup(slow_llama: Path) -> Iterator[str]:
    """The code with which a notebook or script begins."""
    with HostedSwarm(slow_llama, 2) as local:
        facts: dict[str, Any] = {"peers": local.initial_peers, "folder": str(slow_llama)}
        yield SETUP.format(**facts, new=NEW_TOKENS)


@pytest.fixture(scope="module")
def expected(slow_llama: Path) -> list[list[int]]:
    local: Any = AutoModelForCausalLM.from_pretrained(slow_llama, dtype=torch.float32)
    ids = torch.arange(3, 12)[None]
    return local.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False).tolist()


@pytest.fixture(scope="module")
def kernel(setup: str) -> Iterator[Kernel]:
    with Kernel() as kernel:
        kernel.run(setup)
        yield kernel


@pytest.mark.parametrize("delay", [0.05, 0.7])
@pytest.mark.parametrize("work", SLOW)
def test_the_kernels_interrupt(
    kernel: Kernel,
    expected: list[list[int]],
    work: str,
    delay: float,
    record_property: Callable[[str, object], None],
) -> None:
    message = kernel.start(f"print('begun', flush=True); result = {SLOW[work]}")
    kernel.stdout_of(message)
    time.sleep(delay)
    began = time.monotonic()
    with within(INTERRUPT_SECONDS):
        kernel.manager.interrupt_kernel()
        result = kernel.finish(message)
        record_property("interrupt_seconds", time.monotonic() - began)
    assert result.error == "KeyboardInterrupt"
    with within(FREE_SECONDS):
        kernel.run("wait_until_free()")
    assert json.loads(kernel.value("answer()")) == expected


SCRIPT = """
import signal
# A shell that starts a script in the background would have it ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
print("begun", flush=True)
try:
    {work}
except KeyboardInterrupt:
    print("interrupted", flush=True)
wait_until_free()
print("free", flush=True)
print(answer(), flush=True)
"""


def test_ctrl_c_in_a_script(setup: str, expected: list[list[int]]) -> None:
    """The terminal sends the signal to the whole process group: the daemon must survive it."""
    code = setup + SCRIPT.format(work=SLOW["generate"])
    with subprocess.Popen([*WARM, code], stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "begun\n"
        time.sleep(0.7)
        with within(INTERRUPT_SECONDS):
            os.killpg(script.pid, signal.SIGINT)
            assert script.stdout.readline() == "interrupted\n"
        with within(FREE_SECONDS):
            assert script.stdout.readline() == "free\n"
        assert json.loads(script.stdout.readline()) == expected
        assert script.wait(PATIENCE) == 0
