"""Time of a training step through two servers, against local PEFT with the same threads.

Prints one JSON line. Every ratio is remote / local, medians of steps measured in turn in one run,
so that a machine whose speed drifts slows both. One thread per process: the notebook, and each of
the two servers; "local" is this process alone with one thread.

    python benchmarks/training.py [--steps 5]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from typing import Any

import peft
import torch
from common import in_turn, local_model, medians

import swarm_notebook as sn

ROWS, LENGTH = 4, 64
READ_ROWS = 32


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], steps: int) -> dict[str, float]:
    """Medians of both and their ratio, measured in turn after a warm-up."""
    ours(), theirs()
    pairs = in_turn(ours, theirs, steps)
    mine, local = medians(pairs)
    ratio = statistics.median(a / b for a, b in pairs)
    return {"remote_s": round(mine, 3), "local_s": round(local, 3), "ratio": round(ratio, 3)}


def trainer(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A function that makes one optimizer step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def measure(servers: sn.LocalSwarm, steps: int) -> dict[str, Any]:
    swarm = sn.connect(servers.initial_peers, model=servers.model)
    local = local_model(servers.model)
    local.requires_grad_(False)
    torch.manual_seed(0)
    ids = torch.randint(0, local.config.vocab_size, (ROWS, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    results: dict[str, Any] = {}

    prompt = peft.PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM")
    ours, theirs = (peft.get_peft_model(model, prompt) for model in (swarm.model, local))
    results["prompt_tuning"] = compare(trainer(ours, batch), trainer(theirs, batch), steps)
    del ours, theirs

    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ours, theirs = (peft.get_peft_model(model, lora) for model in (swarm.model, local))
    step = trainer(ours, batch)
    results["lora"] = compare(step, trainer(theirs, batch), steps)
    before = swarm.bill()
    step()
    bill = swarm.bill() - before
    results["lora"] |= {
        "sent_bytes": bill.sent,
        "received_bytes": bill.received,
        "trainable_bytes": sum(p.nbytes for p in ours.parameters() if p.requires_grad),
    }
    plain = ours.unload()
    theirs.unload()

    texts = torch.randint(0, local.config.vocab_size, (READ_ROWS, LENGTH))
    with torch.no_grad():
        results["reading_all_states"] = compare(
            lambda: plain(texts, output_hidden_states=True, use_cache=False, logits_to_keep=1),
            lambda: plain(texts, use_cache=False, logits_to_keep=1),
            steps,
        )
    swarm.disconnect()
    gc.collect()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with sn.LocalSwarm(servers=2, threads=1) as servers:
        results = measure(servers, arguments.steps)
    print(json.dumps({"benchmark": "training", "rows": ROWS, "length": LENGTH, **results}))


if __name__ == "__main__":
    main()
