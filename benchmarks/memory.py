"""What a server of the demo model takes in memory at few bits, beside float16; a line of JSON each.

    python benchmarks/memory.py [--bits 4.5]

Each has a process of its own, with all blocks and with one, in which that block's share is taken
off: what is left is the bare process, which has imported the same modules and joined a swarm.
*private* is what no other process shares, *resident* also libraries' pages, *proportional* those by
how many share them; in MiB.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import psutil

import swarm_notebook as sn
from swarm_notebook.checkpoint.files.demo import demo_model
from swarm_notebook.checkpoint.files.source import resolve

# Until measuring of products and collections of garbage are over.
SETTLE_SECONDS = 12
KINDS = ("private", "resident", "proportional")


def taken(model: Any, blocks: int, **options: Any) -> dict[str, float]:
    """MiB of a server with the first blocks."""
    with sn.LocalSwarm(model, [(0, blocks)], **options) as servers:
        time.sleep(SETTLE_SECONDS)
        memory = psutil.Process(servers.servers[0].pid).memory_full_info()
    found = (memory.uss, memory.rss, memory.pss)
    return {kind: round(one / 2**20, 1) for kind, one in zip(KINDS, found, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--bits", type=float, default=4.5)
    bits = parser.parse_args().bits
    model = demo_model()
    blocks = resolve(model).config().num_hidden_layers
    beyond: dict[str, dict[str, float]] = {}
    served: dict[str, dict[str, Any]] = {
        "float16": {"dtype": "float16"},
        f"{bits:g} bits": {"bits": bits},
    }
    for name, options in served.items():
        one, all_of_them = taken(model, 1, **options), taken(model, blocks, **options)
        more = {kind: all_of_them[kind] - one[kind] for kind in KINDS}
        bare = {kind: round(one[kind] - more[kind] / (blocks - 1), 1) for kind in KINDS}
        beyond[name] = {kind: round(all_of_them[kind] - bare[kind], 1) for kind in KINDS}
        facts = {"bare": bare, "blocks": all_of_them, "beyond": beyond[name]}
        print(json.dumps({"what": name, **facts}), flush=True)
    first, second = beyond.values()
    share = {kind: round(second[kind] / first[kind], 3) for kind in KINDS}
    print(json.dumps({"what": "share", **share}), flush=True)


if __name__ == "__main__":
    main()
