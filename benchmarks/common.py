"""What benchmarks share: progress, seconds, models and swarms to measure, parts of a command."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> list[tuple[float, float]]:
    """Seconds of both, again and again: a machine whose speed drifts slows both."""
    return [(seconds(ours), seconds(theirs)) for _ in range(repeats)]


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(one for one, _ in pairs), statistics.median(two for _, two in pairs)


@contextmanager
def demo_swarm(threads: int, servers: int = 2) -> Iterator[tuple[Any, Any]]:
    """Server processes that hold the demo model, and a notebook's `Swarm`."""
    import swarm_notebook as sn

    with (
        sn.LocalSwarm(servers=servers, threads=threads) as local,
        sn.connect(local.initial_peers, model=local.model) as swarm,
    ):
        yield local, swarm


def local_model(path: str) -> Any:
    """What transformers has without us."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def tiny_llama(folder: Path, **changes: Any) -> tuple[Path, Any]:
    """A small Llama of random weights, the same each time: its folder, and itself."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**TINY | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    path = folder / "tiny-llama"
    model.save_pretrained(path)
    return path, model


def summary(text: str | None) -> str:
    """The first line of a program's docstring."""
    return (text or "").partition("\n")[0]


def report(
    options: argparse.Namespace, parts: Mapping[str, Callable[[], dict[str, Any]]], **facts: Any
) -> None:
    """Run those parts that ``--only`` names, or all, and print one JSON line."""
    found: dict[str, Any] = {"threads": options.threads, "cpus": os.cpu_count(), **facts}
    for name in options.only or parts:
        say(f"{name}, load {os.getloadavg()[0]:.1f} …")
        found[name] = parts[name]()
        say(json.dumps(found[name]))
    print(json.dumps(found))


def be_quiet(threads: int) -> None:
    """No progress bars, and so many threads: here, once torch is imported, and in servers."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["TQDM_DISABLE"] = "1"
