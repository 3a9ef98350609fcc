"""The notebook's machine gets into another network in mid-decode: a laptop is carried away."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.forkserver import WARM
from support.networks import CAN_BUILD, Networks
from support.raw_wire import ServerProcess

NOTEBOOK = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
import swarm_notebook as sn

address, folder = sys.argv[1:]
reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
ids = torch.arange(3, 9)[None]
expected = reference.generate(ids, **options).tolist()
with sn.connect([address], model=folder) as swarm:
    for line in sys.stdin:
        longest = 0.0
        for _ in range(int(line)):
            began = time.monotonic()
            right = swarm.model.generate(ids, **options).tolist() == expected
            longest = max(longest, time.monotonic() - began)
            print(json.dumps([right, longest]), flush=True)
        print("[]", flush=True)
"""
# A generation of four tokens, and the ten seconds that a changed network may cost.
LONGEST = 10.0


@pytest.mark.skipif(not CAN_BUILD, reason="needs root and ip")
def test_a_notebook_in_another_network_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    with Networks(2) as networks:
        options = ["--host-maddrs", f"/ip4/{networks.address(0)}/tcp/0"]
        server = ServerProcess(tiny_llama, tmp_path / "0", *options, prefix=networks.prefix(0))
        notebook = None
        try:
            server.wait_ready()
            (address,) = server.facts["maddrs"]
            command = [*networks.prefix(1), *WARM, NOTEBOOK, address, tiny_llama]
            notebook = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )

            def generate(times: int) -> list[list[object]]:
                notebook.stdin.write(f"{times}\n")
                notebook.stdin.flush()
                lines = []
                while line := json.loads(notebook.stdout.readline()):
                    lines.append(line)
                return lines

            assert generate(2)[-1][0]
            networks.move(1)
            after = generate(3)
            assert all(right for right, _ in after)
            assert after[-1][1] < LONGEST
        finally:
            if notebook is not None:
                notebook.kill()
                notebook.communicate()
            server.kill()
