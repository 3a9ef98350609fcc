"""Sessions without a notebook for `gpu`: random hidden states in, the last block's output out.

A process with some of them, so that one Python is not what is measured. It speaks in lines of JSON:
says that it is there, gets the addresses, tells of its prompts, gets a sign, tells of its steps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from typing import Any

from gpu_local import LORA_RANK, LORA_TARGETS, PROMPT, SHAPES, WARM, config

STEPS = 48


class Bare:
    """One session, with an adapter or without."""

    def __init__(self, connection: Any, size: int, adapter: Any = None):
        import torch

        self._session, self._connection = connection.session(), connection
        self._hidden = torch.randn(1, PROMPT, size).to(torch.bfloat16)
        self._position, self._adapter = 0, adapter

    async def go(self, length: int) -> None:
        from swarm_notebook.client.session.history import Pass
        from swarm_notebook.client.session.session import Given

        hidden = self._hidden[:, :length]
        self._session.begin(Pass(self._position, length, {0: hidden}), Given(self._adapter))
        await self._session.step(0, self._connection.num_blocks)
        self._position += length

    def close(self) -> None:
        self._session.close()


def lora(shape: str) -> Any:
    """An adapter of random weights, as a notebook would send it."""
    import uuid

    import peft
    import torch
    from transformers import LlamaForCausalLM

    from swarm_notebook.client.adapters import AdaptedBlock, Adapter
    from swarm_notebook.model.adapters.tuner_layers import describe

    with torch.device("meta"):
        whole = LlamaForCausalLM(config(shape))
        settings = peft.LoraConfig(r=LORA_RANK, target_modules=list(LORA_TARGETS))
        model: Any = peft.get_peft_model(whole, settings).base_model.model
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.requires_grad:
                module._parameters[name] = torch.nn.Parameter(0.02 * torch.randn(weight.shape))
    names = set(model.peft_config)
    blocks = {}
    for index, layer in enumerate(model.model.layers):
        found = describe(layer, index, names, names)
        if found is not None:
            tensors = {name: one.detach() for name, one in found.tensors.items()}
            blocks[index] = AdaptedBlock(found.text, tensors, frozenset())
    return Adapter(uuid.uuid4().hex, 1, peft.__version__, blocks)


def client(shape: str, sessions: int, prompt: int, *, adapted: bool) -> None:
    """The process; ends by itself when it has told all."""
    from swarm_notebook.client.connection import Connection

    adapters = [lora(shape) if adapted else None for _ in range(sessions)]
    print(json.dumps({"there": True}), flush=True)
    peers = json.loads(sys.stdin.readline())
    sizes = SHAPES[shape]
    connection = Connection(peers, f"_dummy-{shape}", sizes["num_hidden_layers"])
    run = connection.network.run
    made = [Bare(connection, sizes["hidden_size"], adapter) for adapter in adapters]
    slowest = 0.0

    async def all_of(length: int, times: int) -> None:
        async def one(session: Bare) -> None:
            nonlocal slowest
            for _ in range(times):
                began = time.perf_counter()
                await session.go(length)
                slowest = max(slowest, time.perf_counter() - began)

        await asyncio.gather(*map(one, made))

    run(all_of(prompt, 1))
    prefill, prefilled, slowest = slowest, time.time(), 0.0
    run(all_of(1, WARM))
    print(json.dumps({"prefill": prefill, "at": prefilled, "slowest": slowest}), flush=True)
    sys.stdin.readline()
    marks = [time.time()]
    run(all_of(1, STEPS))
    marks.append(time.time())
    print(json.dumps(marks), flush=True)
    for session in made:
        session.close()
    connection.close()
    os._exit(0)


class Clients:
    """Such processes, seen from the one that measures. They are there when this is made."""

    def __init__(
        self, shape: str, processes: int, each: int, prompt: int, *, adapted: bool = False
    ):
        command = [sys.executable, __file__, "--shape", shape, "--sessions", str(each)]
        command += ["--prompt", str(prompt), *(["--lora"] if adapted else [])]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(command, env=environment, **pipes) for _ in range(processes)
        ]
        self._heard()

    def prefill(self, peers: list[str]) -> list[dict[str, float]]:
        """Send the prompts, and some steps that do not count."""
        self._tell(json.dumps(peers))
        return self._heard()

    def decode(self) -> list[list[float]]:
        """Decode together; when each began and ended."""
        self._tell("go")
        marks = self._heard()
        for process in self._processes:
            process.wait(30)
        return marks

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def _tell(self, line: str) -> None:
        for process in self._processes:
            print(line, file=process.stdin, flush=True)

    def _heard(self) -> list[Any]:
        lines = [process.stdout.readline() for process in self._processes]  # type: ignore[union-attr]
        if not all(lines):
            raise RuntimeError("a client has ended; its error is above")
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--sessions", type=int)
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    client(options.shape, options.sessions, options.prompt, adapted=options.lora)
