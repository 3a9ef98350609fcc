"""Blocks of an 8B Llama in few bits on a card, beside the same in bfloat16; prints JSON lines.

    python benchmarks/bits_gpu.py [--blocks 4] [--bits 4.5]

Weights are random. *Steps* are tokens per second of one session through one block, as a server
measures them at its start.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--shape", default="8b")
    options = parser.parse_args()
    import torch
    from gpu_local import config

    from swarm_notebook.checkpoint.files.source import resolve
    from swarm_notebook.checkpoint.parts.partial import load_blocks
    from swarm_notebook.server.engine import throughput
    from swarm_notebook.server.engine.products import few_bits
    from swarm_notebook.server.engine.quantising.loading import load_quantised
    from swarm_notebook.server.engine.span import Span
    from swarm_notebook.server.engine.steps.batching import Batching

    torch.backends.cuda.enable_cudnn_sdp(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / options.shape
        config(options.shape).save_pretrained(folder)
        source = resolve(folder, dummy=True)
        size = source.config().hidden_size
        how: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}

        def say(what: str, loaded: Any, **facts: Any) -> None:
            span = Span(loaded.decoder, loaded.layers_name, 0)
            few_bits.install(span.layers)
            batching = Batching.try_out(span, size)
            if device == "cuda":
                batching = batching.with_decoding(span, size, 4096)
            rates = throughput.measure(span, size, batching)
            facts |= {"steps": round(rates.inference_rps), "passes": round(rates.forward_rps)}
            facts |= {"graphs": batching.decoding is not None}
            print(json.dumps({"what": what, **facts}), flush=True)

        say("bfloat16", load_blocks(source, 0, options.blocks, **how))
        began = time.perf_counter()
        loaded, found = load_quantised(source, 0, options.blocks, bits=options.bits, **how)
        seconds = (time.perf_counter() - began) / options.blocks
        facts = {"bits": found.bits, "error": found.error, "seconds_per_block": round(seconds, 2)}
        say(f"{options.bits:g} bits", loaded, **facts)


if __name__ == "__main__":
    main()
