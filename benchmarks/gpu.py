"""How fast servers on a GPU are, against transformers on the same card; a JSON line per figure.

    python benchmarks/gpu.py [--shapes 1b 8b 70b] [--works local one two fresh] [--seconds 480]

Weights are random (``serve --dummy-weights``): shapes are real, answers mean nothing. *Bare*
sessions have no embeddings and no head; they run in processes of their own, so that one Python is
not what is measured. *generate* is a notebook, with its embeddings and its head on the card. The
last line of a shape has ratios to eager transformers of the same run, and the share of the card's
bandwidth: that of the blocks' weights, once per step, against a copy of the device. The works:

local, static     transformers eager, and compiled with its static cache
one, two, cards   one server; two on one card; one on each card, where there are several, in
                  bfloat16 and in 4.5 bits; first as they start, then with all compiled that was
                  asked for
fresh             a new server: its first token; 64 sessions of 2,048 tokens; sessions with adapters
divergence        distributions in bfloat16, a swarm's and local eager's, from local sdpa's
bits              blocks in bfloat16 and in 4.5 bits: by themselves (`gpu_bits`), through a server

``--shapes tiny --device cpu`` tries the program itself; ``--shapes 70b-whole --works cards`` is for
two large cards or more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from gpu_bare import STEPS, Clients
from gpu_local import (
    CONTEXT,
    KL_PROMPT,
    KL_ROWS,
    KL_TOKENS,
    LORA_RANK,
    NEVER,
    NEW_TOKENS,
    PROMPT,
    SHAPES,
    WARM,
    config,
)
from gpu_report import Facts, copied_bytes_per_second, say, summary, token_bytes

# Of sessions: a power of two, on half of the cores, as what they ask for needs the others.
PROCESSES = 1 << max(3, ((os.cpu_count() or 1) // 2).bit_length() - 1)
MANY, LORA_SESSIONS = 64, 8
# A session that grows takes an eighth more than it needs.
CACHE_TOKENS = MANY * (PROMPT + PROMPT // 8 + 64)
WORKS = ("local", "static", "one", "two", "cards", "fresh", "divergence", "bits")
BITS = 4.5
# So long blocks are waited for that are compiled meanwhile.
COMPILE_SECONDS = 150
LOADED = re.compile(r"^(\S+ \S+) INFO loaded blocks \S+ in ([\d.]+) s", re.MULTILINE)


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


class Memory:
    """The most that is taken of the card (of a CPU: by the server's process) within a block."""

    def __init__(self, device: str, pid: int):
        self._device, self._pid = device, pid
        self._over = threading.Event()
        self.before = self.most = 0

    def __enter__(self) -> Self:
        self.before = self.most = self._taken()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.most = max(self.most, self._taken())

    def _taken(self) -> int:
        import psutil
        import torch

        if self._device.startswith("cuda"):
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free
        return int(psutil.Process(self._pid).memory_info().rss)


def local(work: str, shape: str, device: str, *more: str) -> None:
    """Transformers by itself, in a process of its own."""
    beside("gpu_local.py", work, "--shape", shape, "--device", device, *more)


def beside(program: str, *options: str) -> None:
    """Say what a program of this folder says."""
    command = [sys.executable, str(Path(__file__).with_name(program)), *options]
    ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    for line in ran.stdout.splitlines():
        if line.startswith("{"):
            say(**json.loads(line))
    ran.check_returncode()


@contextmanager
def servers(
    model: Path,
    devices: Sequence[str],
    *,
    dummy: bool = True,
    begun: Callable[[], None] = int,
    bits: float | None = None,
) -> Iterator[list[Any]]:
    """Servers that share the blocks, one on each of the devices; all are ready."""
    from swarm_notebook.checkpoint.files.source import resolve
    from swarm_notebook.local.folder import ServerFolder
    from swarm_notebook.local.process import LocalServer
    from swarm_notebook.local.swarm import plan_spans

    blocks = resolve(model, dummy=dummy).config().num_hidden_layers
    logs = ServerFolder()
    made: list[LocalServer] = []
    try:
        for index, span in enumerate(plan_spans(blocks, len(devices))):
            server = LocalServer(
                f"gpu-{index}",
                span,
                str(model),
                folder=logs,
                swarm_addresses=lambda: peers_of(made),
                device=devices[index],
                dtype="bfloat16",
                cache_tokens=CACHE_TOKENS,
                dummy_weights=dummy,
                bits=bits,
            )
            begun()
            made.append(server)
            server.launch()
            server.join(peers_of(made)[:1])
            while not server.addresses:
                server.check()
                time.sleep(0.02)
        for server in made:
            server.wait_ready(300)
        yield made
    finally:
        for server in made:
            print(server.log_tail(12), file=sys.stderr)
            server.terminate()
        logs.remove()


def settle(made: Sequence[Any]) -> None:
    """Wait until nothing is compiled beside the servers any more."""
    import psutil

    quiet, until = 0, time.monotonic() + COMPILE_SECONDS
    while quiet < 8 and time.monotonic() < until:
        lines = []
        for child in (child for one in made for child in psutil.Process(one.pid).children()):
            with suppress(psutil.Error):  # it has just ended
                lines.append(" ".join(child.cmdline()))
        quiet = 0 if any("compiled as it" in line for line in lines) else quiet + 1
        time.sleep(0.25)


def peers_of(made: Sequence[Any]) -> list[str]:
    return [address for server in made for address in server.addresses]


def crowd(
    shape: str, made: Sequence[Any], sessions: int, prompt: int = CONTEXT, *, adapted: bool = False
) -> Facts:
    """Bare sessions that decode together."""
    from swarm_notebook.client.connection import Inquiry

    processes = min(PROCESSES, sessions)
    clients = Clients(shape, processes, sessions // processes, prompt, adapted=adapted)
    peers = peers_of(made)
    inquiry = Inquiry(peers)
    try:
        before = [inquiry.info(server.peer_id) or {} for server in made]
        told = clients.prefill(peers)
        marks = clients.decode()
        after = [inquiry.info(server.peer_id) or {} for server in made]
    finally:
        inquiry.close()
        clients.end()
    steps, calls = (
        [new[name] - old[name] for new, old in zip(after, before, strict=True)]
        for name in ("steps", "step_calls")
    )
    seconds = max(mark[1] for mark in marks) - min(mark[0] for mark in marks)
    return {
        "servers": len(made),
        "sessions": sessions,
        "context": prompt,
        "tokens_per_s": round(sessions * STEPS / seconds, 1),
        "ms_per_step": round(1000 * seconds / STEPS, 2),
        "prefill_ms": round(1000 * max(one["prefill"] for one in told), 1),
        "steps_per_call": [
            round(each / max(own, 1), 1) for each, own in zip(steps, calls, strict=True)
        ],
        "cache_tokens_total": after[0]["cache_tokens_total"],
        "engine": after[0]["engine"],
    }


def notebook(shape: str, folder: Path, made: Sequence[Any], device: str) -> None:
    """A notebook that generates."""
    import torch

    import swarm_notebook as sn

    with sn.connect(peers_of(made), model=folder) as swarm:
        model: Any = swarm.model
        model.to(device)
        ids = torch.randint(3, 1000, (1, PROMPT), device=device)
        for length in (CONTEXT, PROMPT):
            seconds, first = [], []
            for _ in range(3):
                marks = [time.perf_counter()]
                for new in (1, NEW_TOKENS):
                    options = {"max_new_tokens": new, "eos_token_id": NEVER, "do_sample": False}
                    model.generate(ids[:, :length], pad_token_id=0, **options)
                    marks.append(time.perf_counter())
                first.append(marks[1] - marks[0])
                seconds.append((marks[2] - marks[1] - first[-1]) / (NEW_TOKENS - 1))
            say(
                shape,
                "generate",
                servers=len(made),
                context=length,
                tokens_per_s=round(1 / statistics.median(seconds), 1),
                first_token_ms=round(1000 * min(first), 1),
                engine=swarm.info(made[0].peer_id).get("engine"),
            )
        parts = str(swarm.trace()).splitlines()
        print("\n".join(parts[-12:]), file=sys.stderr)


def serve(shape: str, folder: Path, devices: Sequence[str], until: float) -> None:
    """Sessions alone and together, a long prompt, a notebook."""
    began = time.perf_counter()
    with servers(folder, devices) as made:
        seconds = round(time.perf_counter() - began, 1)
        say(shape, "start", servers=len(devices), seconds=seconds)
        for work in ("bare, new server", "bare"):
            for sessions, prompt in ((8, CONTEXT), (32, CONTEXT), (1, CONTEXT), (1, PROMPT)):
                if time.monotonic() < until:
                    say(shape, work, **crowd(shape, made, sessions, prompt))
            settle(made)
        if time.monotonic() < until:
            notebook(shape, folder, made, devices[0])


def fresh(shape: str, folder: Path, device: str, until: float) -> None:
    """What is asked of a server right after its start, then many sessions, then adapters."""
    clients = Clients(shape, 1, 1, CONTEXT)
    marks: list[float] = []
    try:
        with servers(folder, [device], begun=lambda: marks.append(time.time())) as made:
            ready = time.time()
            (told,) = clients.prefill(peers_of(made))
            clients.decode()
            say(shape, "first token", **first_token(made[0], marks[0], ready, told))
            if time.monotonic() < until:
                say(shape, "many", **many(shape, made, device))
            if time.monotonic() < until:
                adapters(shape, made)
    finally:
        clients.end()


def in_bits(shape: str, device: str, bits: float | None) -> None:
    """Blocks in few bits or in bfloat16, by themselves."""
    more = ["--bits", str(bits)] if bits else []
    beside("gpu_bits.py", "--shape", shape, "--device", device, *more)


def served_in_bits(
    shape: str, folder: Path, devices: Sequence[str], bits: float | None, until: float
) -> None:
    """The same through servers that share the blocks."""
    if bits is not None:
        asked = ["--device", devices[0], "--bits", str(bits), "--servers", str(len(devices))]
        beside("gpu_bits.py", "--shape", shape, *asked)
    with servers(folder, devices, bits=bits) as made:
        for sessions, prompt in ((1, CONTEXT), (32, CONTEXT), (1, PROMPT)):
            if time.monotonic() < until:
                crowd(shape, made, sessions, prompt)
                settle(made)
                facts = crowd(shape, made, sessions, prompt)
                say(shape, "bits, through servers", bits=bits or 16, **facts)


def first_token(server: Any, began: float, ready: float, told: Facts) -> Facts:
    """Seconds since the start of the server's process, and the part that is loading weights."""
    loaded = LOADED.search(server.log_path.read_text())
    if loaded is None:
        raise RuntimeError("the server's log does not say when it had loaded")
    at = datetime.strptime(loaded[1], "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()
    return {
        "prompt": CONTEXT,
        "load_s": float(loaded[2]),
        "loaded_after_s": round(at - began, 2),
        "ready_after_s": round(ready - began, 2),
        "first_token_after_s": round(told["at"] - began, 2),
        "first_token_since_loaded_s": round(told["at"] - at, 2),
        "prompt_ms": round(1000 * told["prefill"], 1),
        "slowest_of_first_steps_ms": round(1000 * told["slowest"], 1),
    }


def many(shape: str, made: Sequence[Any], device: str) -> Facts:
    with Memory(device, made[0].pid) as memory:
        crowd(shape, made, MANY, PROMPT)
        settle(made)
        found = crowd(shape, made, MANY, PROMPT)
    grown = memory.most - memory.before
    budget = found["cache_tokens_total"] * token_bytes(shape)
    return {
        **found,
        "budget_mb": round(budget / 1e6),
        "cache_mb": round(MANY * (PROMPT + WARM + STEPS) * token_bytes(shape) / 1e6),
        "grown_mb": round(grown / 1e6),
        "grown_of_budget": round(grown / budget, 2),
    }


def adapters(shape: str, made: Sequence[Any]) -> None:
    """Sessions with an adapter each, beside as many without."""
    base = crowd(shape, made, LORA_SESSIONS)
    with_lora = crowd(shape, made, LORA_SESSIONS, adapted=True)
    share = round(with_lora["tokens_per_s"] / base["tokens_per_s"], 2)
    say(
        shape,
        "lora",
        rank=LORA_RANK,
        base=base["tokens_per_s"],
        of_base=share,
        **with_lora,
    )


def divergence(shape: str, folder: Path, device: str, *, dummy: bool = True) -> None:
    """Distributions of texts that a swarm writes, step by step, against local ones."""
    import torch

    import swarm_notebook as sn

    options = {"max_new_tokens": KL_TOKENS, "min_new_tokens": KL_TOKENS, "do_sample": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with tempfile.TemporaryDirectory() as where:
        file = Path(where) / "found"
        with servers(folder, [device], dummy=dummy) as made:
            with sn.connect(peers_of(made), model=folder) as swarm:
                model: Any = swarm.model
                torch.manual_seed(0)
                ids = torch.randint(3, 1000, (KL_ROWS, KL_PROMPT)).to(model.device)
                found = model.generate(ids, pad_token_id=0, **options)
            logits = torch.stack(found.logits, 1).cpu()
        torch.save({"sequences": found.sequences.cpu(), "logits": logits}, file)
        more = ["--folder", str(folder), "--found", str(file)]
        local("divergence", shape, device, *more)


def trained_divergence(shape: str, device: str) -> None:
    """The same of the demo model, whose weights are no noise."""
    from swarm_notebook.checkpoint.files.demo import demo_model

    divergence(shape, demo_model(), device, dummy=False)


def attempt(shape: str, what: str, work: Callable[[], None]) -> None:
    """One that fails does not keep the others from being measured."""
    try:
        work()
    except Exception as error:
        say(shape, what, failed=f"{type(error).__name__}: {error}"[:600])


def measure(shape: str, device: str, works: Sequence[str], until: float) -> None:
    import torch

    cards = torch.cuda.device_count() if device == "cuda" else 0
    all_cards = [f"cuda:{card}" for card in range(cards)]
    with tempfile.TemporaryDirectory() as where:
        folder = folder_of(shape, Path(where))
        known: dict[str, list[Callable[[], None]]] = {
            "local": [lambda: local("eager", shape, device)],
            "static": [lambda: local("static", shape, device)],
            "one": [lambda: serve(shape, folder, [device], until)],
            "two": [lambda: serve(shape, folder, [device] * 2, until)],
            "cards": [
                lambda: serve(shape, folder, all_cards, until),
                lambda: served_in_bits(shape, folder, all_cards, BITS, until),
            ],
            "fresh": [lambda: fresh(shape, folder, device, until)],
            "bits": [
                lambda: in_bits(shape, device, BITS),
                lambda: served_in_bits(shape, folder, [device], BITS, until),
                lambda: served_in_bits(shape, folder, [device], None, until),
                lambda: in_bits(shape, device, None),
            ],
            "divergence": [
                lambda: divergence(shape, folder, device),
                lambda: trained_divergence(shape, device),
            ],
        }
        for name in works:
            if name == "cards" and cards < 2:
                continue
            for work in known[name]:
                if time.monotonic() < until:
                    attempt(shape, name, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b"], choices=SHAPES)
    parser.add_argument("--works", nargs="+", default=WORKS, choices=WORKS)
    parser.add_argument("--seconds", type=float, default=480, help="begin nothing after these")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    import torch

    until = time.monotonic() + options.seconds
    copied = None
    if options.device == "cuda":
        copied = copied_bytes_per_second()
        say(
            "",
            "card",
            name=torch.cuda.get_device_name(),
            torch=torch.__version__,
            copy_tb_per_s=round(copied / 1e12, 2),
        )
        torch.cuda.empty_cache()
    for shape in options.shapes:
        measure(shape, options.device, options.works, until)
        summary(shape, copied)


if __name__ == "__main__":
    main()
