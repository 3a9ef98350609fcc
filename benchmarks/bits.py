"""What few bits do to the demo model: a JSON line per number of bits; takes some minutes.

    python benchmarks/bits.py [--bits 4.5 3.5 8.5] [--model MODEL]

The Kullback-Leibler divergence of the next token's distribution from that of the whole weights, and
the ratio of perplexities, on text that nothing was chosen by; beside one 4-bit grid for all
matrices (groups of 64: 4.5 bits), rounded to the nearest between a group's extremes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

# The licence of this project: plain English that no choice was made by.
TEXT = Path(__file__).parents[1] / "CONTRIBUTING.md"
POSITIONS, ROWS = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", nargs="+", type=float, default=[4.5])
    parser.add_argument("--model")
    options = parser.parse_args()
    import torch
    from torch.nn.functional import cross_entropy, kl_div, log_softmax

    from swarm_notebook.checkpoint.files.source import resolve
    from swarm_notebook.checkpoint.packed import Grid, matrices, pack, replace
    from swarm_notebook.checkpoint.parts.partial import load_blocks, load_edges
    from swarm_notebook.server.engine.quantising.loading import load_quantised

    source = resolve(options.model)
    edges, _ = load_edges(source, dtype=torch.float32)
    count = source.config().num_hidden_layers
    tokenizer: Any = source.tokenizer()
    ids = torch.tensor(tokenizer(TEXT.read_text())["input_ids"])[: ROWS * POSITIONS]
    ids = ids.view(-1, POSITIONS)

    @torch.inference_mode()
    def logits(blocks: Any) -> torch.Tensor:
        states = blocks.model(
            inputs_embeds=edges.get_input_embeddings()(ids), use_cache=False
        ).last_hidden_state
        return log_softmax(edges.lm_head(edges.model.norm(states)), dim=-1)

    def loss(found: torch.Tensor) -> float:
        return float(cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    whole = load_blocks(source, 0, count, dtype=torch.float32)
    expected = logits(whole)
    # Rounded to the nearest in one grid, as the simplest tools do.
    for layer in whole.layers:
        for _, module, name, weight in list(matrices(layer)):
            replace(module, name, _nearest(pack, weight.detach(), Grid(4, 64)), torch.float32)

    def say(what: str, found: torch.Tensor, **facts: Any) -> None:
        divergence = kl_div(found, expected, log_target=True, reduction="sum") / ids.numel()
        ratio = float(torch.tensor(loss(found) - loss(expected)).exp())
        facts |= {"kl": round(float(divergence), 5), "perplexity_ratio": round(ratio, 4)}
        print(json.dumps({"what": what, **facts}), flush=True)

    say("one 4-bit grid, 4.5 bits", logits(whole))
    for bits in options.bits:
        began = time.perf_counter()
        packed, found = load_quantised(source, 0, count, bits=bits, dtype=torch.float32)
        seconds = round(time.perf_counter() - began, 1)
        say(f"{bits:g} bits", logits(packed), bits=found.bits, error=found.error, seconds=seconds)


def _nearest(pack: Any, weight: Any, grid: Any) -> Any:
    """Packed by the extremes of each group, none of which is shrunk."""
    from unittest.mock import patch

    with patch.dict("swarm_notebook.checkpoint.packed._SHRUNK", {grid.bits: (1.0,)}):
        return pack(weight, grid)


if __name__ == "__main__":
    main()
