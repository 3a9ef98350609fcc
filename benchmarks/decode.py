"""How fast a notebook decodes through a swarm on this machine; prints one JSON line.

    python benchmarks/decode.py [--threads N] [--only demo connect …]

Everything is compared with local transformers in the same run, with the same number of threads
in each process: the demo model and a tiny Llama, both over two servers; local and remote runs
alternate, the medians count. A prompt of 2,000 tokens shows whether both servers work at once,
which takes a core for each. Connecting is measured in fresh processes and split into its parts.
Progress goes to standard error. It takes about two minutes on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import (
    be_quiet,
    demo_swarm,
    in_turn,
    local_model,
    medians,
    report,
    seconds,
    summary,
    tiny_llama,
)

PROMPT = "The history of the lighthouse at the end of the cape begins with a storm"
NEW_TOKENS = 64
PARTS = ("demo", "tiny", "prefill", "connect", "invitation", "embedded")
REPEATS = 5
FRESH_PROCESSES = 3
PROMPT_TOKENS, PREFILL_REPEATS = 2000, 2
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


def token_seconds(remote: Any, local: Any, ids: Any) -> tuple[float, float]:
    """Median seconds per token, remote and local; the outputs must be equal."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    tokens = [model.generate(ids, **options).tolist() for model in (remote, local)]  # warm-up
    if tokens[0] != tokens[1]:
        raise SystemExit("remote and local tokens differ: a speed is meaningless")
    ours, theirs = medians(
        in_turn(
            lambda: remote.generate(ids, **options),
            lambda: local.generate(ids, **options),
            REPEATS,
        )
    )
    return ours / NEW_TOKENS, theirs / NEW_TOKENS


def demo(threads: int) -> dict[str, Any]:
    """The demo model over two servers: share of the local speed."""
    with demo_swarm(threads) as (servers, swarm):
        ids = swarm.tokenizer(PROMPT, return_tensors="pt").input_ids
        ours, theirs = token_seconds(swarm.model, local_model(servers.model), ids)
    return {
        "remote_tokens_per_s": round(1 / ours, 2),
        "local_tokens_per_s": round(1 / theirs, 2),
        "ratio": round(theirs / ours, 3),
        "goal_ratio": 0.9,
    }


def tiny(threads: int) -> dict[str, Any]:
    """A tiny Llama over two servers: what a token costs beyond local."""
    import torch

    import swarm_notebook as sn

    with tempfile.TemporaryDirectory() as folder:
        path, local = tiny_llama(Path(folder))
        with (
            sn.LocalSwarm(path, threads=threads) as servers,
            sn.connect(servers.initial_peers, model=path) as swarm,
        ):
            ours, theirs = token_seconds(swarm.model, local, torch.arange(3, 19)[None])
    return {
        "remote_ms_per_token": round(1000 * ours, 2),
        "local_ms_per_token": round(1000 * theirs, 2),
        "beyond_local_ms": round(1000 * (ours - theirs), 2),
        "goal_beyond_local_ms": 1.5,
    }


def prefill(threads: int) -> dict[str, Any]:
    """A long prompt over two servers of the demo model: how much sooner than local."""
    import torch

    with demo_swarm(threads) as (servers, swarm):
        local = local_model(servers.model)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, local.config.vocab_size, (1, PROMPT_TOKENS), generator=generator)
        pairs = in_turn(
            lambda: swarm.model.generate(ids, max_new_tokens=1, **GREEDY),
            lambda: local.generate(ids, max_new_tokens=1, **GREEDY),
            PREFILL_REPEATS + 1,
        )
        ours, theirs = medians(pairs[1:])
        trip = statistics.mean(swarm.connection.directory.rtt.values())
    return {
        "tokens": PROMPT_TOKENS,
        "remote_s": round(ours, 2),
        "local_s": round(theirs, 2),
        "speedup": round(theirs / ours, 2),
        "round_trip_ms": round(1000 * trip, 2),
        "goal_speedup": 1.6,
    }


def fresh(*arguments: str) -> dict[str, float]:
    """Medians of the parts that fresh processes report, each of a user who is no member yet."""
    found: list[dict[str, float]] = []
    for _ in range(FRESH_PROCESSES):
        command = [sys.executable, __file__, *arguments]
        with tempfile.TemporaryDirectory() as data:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | {"XDG_DATA_HOME": data},
            )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {part: round(statistics.median(run[part] for run in found), 2) for part in found[0]}


def connect() -> dict[str, float]:
    """From a fresh process to the first token of a swarm that is there."""
    import swarm_notebook as sn

    with sn.LocalSwarm(threads=1) as servers:
        return fresh("--child", "--model", servers.model, "--peers", *servers.initial_peers)


def invitation() -> dict[str, float]:
    """From pasting an invitation to the first token: nothing else is known, not even the model.

    The goal is of a kernel that has loaded the extension, which imports all of it meanwhile.
    """
    import swarm_notebook as sn

    with tempfile.TemporaryDirectory() as data:
        os.environ["XDG_DATA_HOME"] = data  # swarm keys and memberships of others are no matter
        with sn.LocalSwarm(threads=1, private=True) as servers:
            found = fresh("--child", "--peers", servers.invite(uses=FRESH_PROCESSES))
    return found | {"pasted": round(found["all"] - found["import"], 2), "goal_pasted": 5.0}


def embedded() -> dict[str, float]:
    """From a fresh process to the first token, with servers of its own."""
    return fresh("--child")


@contextmanager
def timed(parts: dict[str, float], owner: Any, **names: str) -> Any:
    """Add the seconds that functions of `owner` take to `parts`, under the given names."""
    originals = {name: getattr(owner, name) for name in names}
    for name, part in names.items():

        def wrapper(*args: Any, _call: Any = originals[name], _part: str = part, **kw: Any) -> Any:
            began = time.perf_counter()
            try:
                return _call(*args, **kw)
            finally:
                parts[_part] = parts.get(_part, 0.0) + time.perf_counter() - began

        setattr(owner, name, wrapper)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


def child(peers: list[str] | None, model: str | None) -> None:
    """In a fresh process: connect, generate one token, print the seconds of each part."""
    began = time.perf_counter()
    from swarm_notebook import connecting as module
    from swarm_notebook.checkpoint.files.source import ModelSource
    from swarm_notebook.client import connection

    parts = {"import": time.perf_counter() - began}
    given = peers[0] if peers and len(peers) == 1 else peers  # an invitation is no list
    with (
        timed(parts, module.LocalSwarm, __init__="servers"),
        timed(parts, module.Connection, __init__="join"),
        timed(parts, connection, _acquire="join: daemon and DHT"),
        timed(parts, module.skeleton, build="embeddings and head"),
        timed(parts, ModelSource, tokenizer="tokenizer"),
    ):
        parts["connect"] = seconds(lambda: opened.append(module.connect(given, model=model)))
    (swarm,) = opened
    ids = swarm.tokenizer(PROMPT, return_tensors="pt").input_ids
    parts["first token"] = seconds(lambda: swarm.model.generate(ids, max_new_tokens=1))
    parts["all"] = parts["import"] + parts["connect"] + parts["first token"]
    swarm.disconnect()
    print(json.dumps(parts))


opened: list[Any] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--threads", type=int, default=1, help="per process (default: 1)")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--peers", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    be_quiet(options.threads)
    if options.child:
        child(options.peers, options.model)
        return
    parts = {
        "demo": lambda: demo(options.threads),
        "tiny": lambda: tiny(options.threads),
        "prefill": lambda: prefill(options.threads),
        "connect": connect,
        "invitation": invitation,
        "embedded": embedded,
    }
    report(options, parts)


if __name__ == "__main__":
    main()
