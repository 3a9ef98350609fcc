"""What connecting leaves behind; prints one JSON line of what is there more than at the start.

    python benchmarks/leaks.py [--connects 300]

A server process of a tiny Llama. This process connects, runs the model, generates two tokens and
disconnects, again and again. Counted are open files, threads and child processes of both, resident
memory in MiB, and files in the temporary folder, from after the first `WARM` connections on, which
import and cache what every later one uses. Two seconds for each connection on two busy cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import tiny_llama

WARM = 10
# How long what was closed may take to be gone: a stream lingers for some seconds.
GRACE_SECONDS = 30.0


def counted(server: int, folder: Path) -> dict[str, int]:
    """What this process and the server hold now."""
    gc.collect()
    found = {"temporary_files": len(list(folder.iterdir()))}
    for name, process in (("notebook", psutil.Process()), ("server", psutil.Process(server))):
        found |= {
            f"{name}_files": process.num_fds(),
            f"{name}_threads": process.num_threads(),
            f"{name}_children": len(process.children(recursive=True)),
            f"{name}_mib": process.memory_info().rss >> 20,
        }
    return found


def settled(server: int, folder: Path, before: dict[str, int]) -> dict[str, int]:
    """What is there more than before, when it gets no less."""
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        now = counted(server, folder)
        more = {name: now[name] - value for name, value in before.items()}
        left = [value for name, value in more.items() if not name.endswith("_mib")]
        if max(left) <= 0 or time.monotonic() > deadline:
            return more
        time.sleep(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connects", type=int, default=300)
    connects = parser.parse_args().connects
    with tempfile.TemporaryDirectory(prefix="leaks-") as temporary:
        os.environ["TMPDIR"] = tempfile.tempdir = temporary
        print(json.dumps(measured(connects, Path(temporary))))


def measured(connects: int, folder: Path) -> dict[str, Any]:
    import torch

    import swarm_notebook as sn

    model, _ = tiny_llama(folder)
    ids, before, began = torch.arange(3, 12)[None], {}, 0.0
    with sn.LocalSwarm(model, 1, threads=1) as local:
        server = local.servers[0].pid
        for number in range(WARM + connects):
            if number == WARM:
                before, began = counted(server, folder), time.monotonic()
            with sn.connect(local.initial_peers, model=model) as swarm:
                swarm.model(ids).logits.sum()
                swarm.model.generate(ids, max_new_tokens=2, do_sample=False)
            if number % 50 == 0:
                print(number, file=sys.stderr, flush=True)
        each = (time.monotonic() - began) / connects
        return {"connects": connects, "seconds_each": round(each, 2)} | settled(
            server, folder, before
        )


if __name__ == "__main__":
    main()
