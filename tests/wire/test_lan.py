"""A swarm of a local network is found without an address; of a private one nothing but a mark.

On real machines of a network of their own, as far as the system has such: namespaces on a bridge.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forkserver import WARM
from support.networks import CAN_BUILD, local_network
from support.patience import PATIENCE
from support.raw_wire import ServerProcess
from transformers import AutoModelForCausalLM

from swarm_notebook.net.lan import fingerprint
from swarm_notebook.net.membership.authority import begun_here
from swarm_notebook.net.membership.certificate import Role

pytestmark = pytest.mark.skipif(not CAN_BUILD, reason="needs root and ip")

OPEN = ("--host-maddrs", "/ip4/0.0.0.0/tcp/0", "--lan")
# Finds as many servers as it is told to, and computes; an invitation is all that a private swarm
# lets one in by.
NOTEBOOK = """
import asyncio, json, sys, torch, swarm_notebook as sn
from swarm_notebook.net import lan
model, count, *invitation = sys.argv[1:]
torch.set_num_threads(1)
found = []
while len(found) < int(count):
    found = asyncio.run(lan.look())
told = [[one.addresses, one.model, one.swarm] for one in found]
if not invitation:  # whichever of them one knows
    for one in found:
        while sn.look(one.addresses, model=model).missing:
            pass
try:
    logits = None
    with sn.connect(lan=True, model=model) as swarm:
        logits = swarm.model(torch.arange(3, 15)[None]).logits.tolist()
except sn.errors.ConnectionFailed as error:
    told.append(str(error))
if invitation:
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "swarm_notebook")
    shell.run_line_magic("swarm", f"connect --lan {invitation[0]} --model {model}")
    logits = shell.user_ns["model"](torch.arange(3, 15)[None]).logits.tolist()
    shell.run_line_magic("swarm", "disconnect")
print(json.dumps({"told": told, "logits": logits}))
"""
# Another machine's, which lends with its notebook.
LENDER = """
import sys, time, swarm_notebook as sn
local = sn.LocalSwarm(sys.argv[1], [(2, 5)], lan=True, threads=1)
print(*local.initial_peers, flush=True)
sys.stdin.read()
local.close()
"""
# Somebody answers to the name with rubbish.
RUBBISH = """
import asyncio
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf
SERVICE = "_swarm-notebook._tcp.local."
async def main():
    zeroconf = AsyncZeroconf()
    words = [{"peer": "../../etc"}, {"peer": "\\x1b[31m" * 20, "model": "x" * 200}, {}]
    for number, some in enumerate(words):
        info = AsyncServiceInfo(
            SERVICE, f"r{number}.{SERVICE}", port=number, properties=some,
            parsed_addresses=["10.78.0.3", "127.0.0.1", "224.0.0.251"], server="rubbish.local.",
        )
        await (await zeroconf.async_register_service(info))
    print("there", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def notebook(machine: Sequence[str], *arguments: str) -> Any:
    command = [*machine, *WARM, NOTEBOOK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Sequence[str]]]:
    with local_network(3) as made:
        yield made


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> torch.Tensor:
    local = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        return local(torch.arange(3, 15)[None]).logits


def test_two_that_begin_at_once_are_one_swarm_and_a_notebook_finds_it(
    machines: list[Sequence[str]], tiny_llama: Path, tmp_path: Path, expected: torch.Tensor
) -> None:
    first, second, third = machines
    server = ServerProcess(tiny_llama, tmp_path / "0", *OPEN, "--blocks", "0:2", prefix=first)
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    lender = subprocess.Popen([*second, *WARM, LENDER, str(tiny_llama)], **pipes)
    rubbish = subprocess.Popen([*third, sys.executable, "-c", RUBBISH], **pipes)
    try:
        server.wait_ready()
        lent = lender.stdout.readline().split()
        assert rubbish.stdout.readline() == "there\n"
        got = notebook(third, str(tiny_llama), "2")
        assert {addresses[0]: told for addresses, *told in got["told"]} == {
            address: [tiny_llama.name, ""]
            for address in (*server.facts["maddrs"], *lent)
            if "/10.78." in address
        }
        torch.testing.assert_close(torch.tensor(got["logits"]), expected, atol=1e-4, rtol=0)
    finally:
        rubbish.kill()
        rubbish.communicate()
        lender.communicate()
        server.kill()


def test_a_private_swarm_is_found_by_who_is_invited(
    machines: list[Sequence[str]],
    tiny_llama: Path,
    tmp_path: Path,
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, _ = machines
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    server = ServerProcess(tiny_llama, tmp_path / "log", *OPEN, "--private", prefix=first)
    try:
        server.wait_ready()
        invitation = begun_here(tiny_llama.name).invite(Role.NOTEBOOK.label)
        # The server has got another address since.
        moved = [address.replace("/10.78.0.1/", "/10.78.0.77/") for address in invitation.addresses]
        moved = [address for address in moved if "/10.78.0.77/" in address]
        text = str(dataclasses.replace(invitation, addresses=tuple(moved)))
        got = notebook(second, str(tiny_llama), "1", text)
        torch.testing.assert_close(torch.tensor(got["logits"]), expected, atol=1e-4, rtol=0)
        (_, model, swarm), refused = got["told"]
        assert (model, swarm) == ("", fingerprint(invitation.swarm))
        assert "no server of a swarm of" in refused
        assert "with its invitation only" in refused
    finally:
        server.kill()
