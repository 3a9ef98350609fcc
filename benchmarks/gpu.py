"""How fast servers on a GPU are, against transformers on the same card; a JSON line per figure.

    python benchmarks/gpu.py [--shapes 1b 8b 70b] [--seconds 480]

Weights are random (``serve --dummy-weights``): shapes are real, answers mean nothing. *Bare*
sessions have no embeddings and no head; they run in processes of their own, so that one Python is
not what is measured. *generate* is a notebook, with its embeddings and its head on the card. The
share of the bandwidth is that of the weights, once per call, against a copy of the device.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONTEXT, STEPS, WARM = 448, 48, 8
PROMPT, NEW_TOKENS, LOCAL_STEPS = 2048, 48, 24
CLIENTS = 8
CACHE_TOKENS = 64 << 10
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 30},
}
HEADS = {"tiny": (4, 2), "1b": (32, 8), "8b": (32, 8), "70b": (64, 8)}


def say(shape: str, what: str, **facts: Any) -> None:
    print(json.dumps({"shape": shape, "what": what, **facts}), flush=True)


def config(shape: str) -> Any:
    from transformers import LlamaConfig

    heads, groups = HEADS[shape]
    made = LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    made.dtype = "bfloat16"
    made.architectures = ["LlamaForCausalLM"]
    return made


def folder_of(shape: str, where: Path) -> Path:
    """A config, and the embeddings and the head that a notebook needs."""
    import torch
    from safetensors.torch import save_file

    from swarm_notebook.checkpoint.files.dummy import PREFIX, DummyWeights
    from swarm_notebook.checkpoint.files.weights import block_index

    folder = where / f"{PREFIX}{shape}"
    config(shape).save_pretrained(folder)
    weights = DummyWeights(config(shape))
    names = [name for name in weights.names() if block_index(name) is None]
    tensors = {n: lazy[:].to(torch.bfloat16) for n, lazy in weights.lazy(names).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copied_bytes_per_second() -> float:
    import torch

    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    return 10 * 2 * source.numel() / (time.perf_counter() - began)


def local(shape: str, device: str) -> None:
    """Transformers by itself, in a process of its own."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config(shape)).eval()
    size = model.config.hidden_size

    def sync() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    ids = torch.randint(3, 1000, (1, PROMPT), device=device)
    with torch.inference_mode():
        for _ in range(2):
            sync()
            began = time.perf_counter()
            model.model(ids)
            sync()
            took = time.perf_counter() - began
        say(shape, "local eager prefill", tokens=PROMPT, ms=round(1000 * took, 1))
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            model.generate(ids[:, :CONTEXT], pad_token_id=0, **options)
            sync()
            seconds.append(time.perf_counter() - began)
        rate = NEW_TOKENS / statistics.median(seconds)
        say(shape, "local eager generate", streams=1, tokens_per_s=round(rate, 1))
        for rows in (1, 8, 32):
            cache = DynamicCache(config=model.config)
            hidden = torch.randn(rows, CONTEXT, size, device=device)
            model.model(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
            for step in range(LOCAL_STEPS + WARM):
                if step == WARM:
                    sync()
                    began = time.perf_counter()
                model.model(inputs_embeds=hidden[:, :1], past_key_values=cache, use_cache=True)
            sync()
            rate = rows * LOCAL_STEPS / (time.perf_counter() - began)
            say(shape, "local eager decode", streams=rows, tokens_per_s=round(rate, 1))


class Bare:
    """A session without a notebook: random hidden states in, the last block's output out."""

    def __init__(self, connection: Any, size: int):
        import torch

        self._session, self._connection = connection.session(), connection
        self._hidden = torch.randn(1, PROMPT, size).to(torch.bfloat16)
        self._position = 0

    async def go(self, length: int) -> None:
        from swarm_notebook.client.session.history import Pass
        from swarm_notebook.client.session.session import Given

        hidden = self._hidden[:, :length]
        self._session.begin(Pass(self._position, length, {0: hidden}), Given())
        await self._session.step(0, self._connection.num_blocks)
        self._position += length

    def close(self) -> None:
        self._session.close()


def client(shape: str, sessions: int, prompt: int) -> None:
    """A process with some bare sessions; speaks with `crowd` in lines."""
    from swarm_notebook.client.connection import Connection

    peers = json.loads(sys.stdin.readline())
    sizes = SHAPES[shape]
    connection = Connection(peers, f"_dummy-{shape}", sizes["num_hidden_layers"])
    run = connection.network.run
    made = [Bare(connection, sizes["hidden_size"]) for _ in range(sessions)]

    async def all_of(length: int, times: int) -> None:
        async def one(session: Bare) -> None:
            for _ in range(times):
                await session.go(length)

        await asyncio.gather(*map(one, made))

    began = time.perf_counter()
    run(all_of(prompt, 1))
    prefill = time.perf_counter() - began
    run(all_of(1, WARM))
    print(json.dumps({"prefill": prefill}), flush=True)
    sys.stdin.readline()
    marks = [time.time()]
    run(all_of(1, STEPS))
    marks.append(time.time())
    print(json.dumps(marks), flush=True)
    for session in made:
        session.close()
    connection.close()
    os._exit(0)


def crowd(shape: str, peers: list[str], sessions: int, prompt: int = CONTEXT) -> dict[str, Any]:
    """Bare sessions that decode together."""
    from swarm_notebook.client.connection import Inquiry

    count = min(CLIENTS, sessions)
    inquiry = Inquiry(peers)
    peer = peers[0].rpartition("/")[2]
    before = inquiry.info(peer) or {}
    command = [sys.executable, __file__, "--client", str(sessions // count)]
    command += ["--shapes", shape, "--prompt", str(prompt)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(count)]
    for process in processes:
        print(json.dumps(peers), file=process.stdin, flush=True)
    prefills = [json.loads(process.stdout.readline())["prefill"] for process in processes]
    for process in processes:
        print("go", file=process.stdin, flush=True)
    marks = [json.loads(process.stdout.readline()) for process in processes]
    for process in processes:
        process.wait(30)
    after = inquiry.info(peer) or {}
    inquiry.close()
    steps, calls = (after[name] - before[name] for name in ("steps", "step_calls"))
    seconds = max(mark[1] for mark in marks) - min(mark[0] for mark in marks)
    return {
        "sessions": sessions,
        "context": prompt,
        "tokens_per_s": round(sessions * STEPS / seconds, 1),
        "ms_per_step": round(1000 * seconds / STEPS, 2),
        "prefill_ms": round(1000 * max(prefills), 1),
        "steps_per_call": round(steps / calls, 1),
        "engine": after["engine"],
    }


@contextmanager
def servers(folder: Path, count: int, device: str) -> Iterator[list[str]]:
    from swarm_notebook.local.folder import ServerFolder
    from swarm_notebook.local.process import LocalServer, server_environment
    from swarm_notebook.local.swarm import plan_spans

    blocks = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    logs = ServerFolder()
    made: list[LocalServer] = []
    options = [str(folder), "--dummy-weights", "--device", device, "--dtype", "bfloat16"]
    options += ["--cache-tokens", str(CACHE_TOKENS)]

    def peers() -> list[str]:
        return [address for server in made for address in server.addresses]

    try:
        for index, span in enumerate(plan_spans(blocks, count)):
            server = LocalServer(
                f"gpu-{index}",
                span,
                folder=logs,
                options=options,
                environment=server_environment(None),
                swarm_addresses=peers,
            )
            made.append(server)
            server.launch()
            server.join(peers()[:1])
            while not server.addresses:
                server.check()
                time.sleep(0.1)
        for server in made:
            server.wait_ready(200)
        yield peers()
    finally:
        for server in made:
            print(server.log_tail(12), file=sys.stderr)
            server.terminate()
        logs.remove()


def notebook(shape: str, folder: Path, peers: list[str], count: int, device: str) -> None:
    """A notebook that generates."""
    import torch

    import swarm_notebook as sn

    with sn.connect(peers, model=folder) as swarm:
        model: Any = swarm.model
        model.to(device)
        info = swarm.info(swarm.route().hops[0].peer_id)
        ids = torch.randint(3, 1000, (1, PROMPT), device=device)
        for length in (CONTEXT, PROMPT):
            seconds, first = [], []
            for _ in range(3):
                marks = [time.perf_counter()]
                for new in (1, NEW_TOKENS):
                    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
                    model.generate(ids[:, :length], pad_token_id=0, **options)
                    marks.append(time.perf_counter())
                first.append(marks[1] - marks[0])
                seconds.append((marks[2] - marks[1] - first[-1]) / (NEW_TOKENS - 1))
            say(
                shape,
                "generate",
                servers=count,
                context=length,
                tokens_per_s=round(1 / statistics.median(seconds), 1),
                first_token_ms=round(1000 * min(first), 1),
                engine=info.get("engine"),
            )
        parts = str(swarm.trace()).splitlines()
        print("\n".join(parts[-12:]), file=sys.stderr)


def measure(shape: str, device: str, deadline: float) -> None:
    with tempfile.TemporaryDirectory() as where:
        folder = folder_of(shape, Path(where))
        me = [sys.executable, __file__, "--shapes", shape, "--device", device]
        subprocess.run([*me, "--local"], check=False)
        for count in (1, 2):
            began = time.perf_counter()
            with servers(folder, count, device) as peers:
                say(shape, "start", servers=count, seconds=round(time.perf_counter() - began, 1))
                for sessions in (1, 8, 32):
                    if time.monotonic() < deadline:
                        say(shape, "bare", servers=count, **crowd(shape, peers, sessions))
                if time.monotonic() < deadline:
                    say(shape, "bare", servers=count, **crowd(shape, peers, 1, PROMPT))
                if time.monotonic() < deadline:
                    notebook(shape, folder, peers, count, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b"], choices=SHAPES)
    parser.add_argument("--seconds", type=float, default=480, help="begin nothing after these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--prompt", type=int, default=CONTEXT, help=argparse.SUPPRESS)
    parser.add_argument("--local", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    if options.client:
        client(options.shapes[0], options.client, options.prompt)
    elif options.local:
        local(options.shapes[0], options.device)
    else:
        import torch

        deadline = time.monotonic() + options.seconds
        if options.device == "cuda":
            say(
                "",
                "card",
                name=torch.cuda.get_device_name(),
                torch=torch.__version__,
                copy_tb_per_s=round(copied_bytes_per_second() / 1e12, 2),
            )
        for shape in options.shapes:
            measure(shape, options.device, deadline)


if __name__ == "__main__":
    main()
