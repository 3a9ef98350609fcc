"""What `gpu` prints: a JSON line per figure, and what they come to."""

from __future__ import annotations

import time
from typing import Any

import gpu_local
from gpu_local import HEADS, PROMPT, SHAPES

Facts = dict[str, Any]
_said: list[Facts] = []


def say(shape: str, what: str, **facts: Any) -> None:
    _said.append({"shape": shape, "what": what, **facts})
    gpu_local.say(shape, what, **facts)


def block_bytes(shape: str) -> int:
    """Bytes of the blocks' weights in bfloat16."""
    sizes, (heads, groups) = SHAPES[shape], HEADS[shape]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    projections = 2 * hidden * hidden + 2 * hidden * hidden * groups // heads
    return 2 * sizes["num_hidden_layers"] * (projections + 3 * hidden * inner)


def token_bytes(shape: str) -> int:
    """Bytes of one token's keys and values in all blocks, in bfloat16."""
    sizes, (heads, groups) = SHAPES[shape], HEADS[shape]
    return 4 * sizes["num_hidden_layers"] * groups * sizes["hidden_size"] // heads


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


def summary(shape: str, copied: float | None) -> None:
    """Ratios to eager transformers, and shares of the bandwidth, of what was measured."""

    def find(what: str, **like: Any) -> Facts | None:
        for one in _said:
            if one["shape"] == shape and one["what"] == what and like.items() <= one.items():
                return one
        return None

    found: Facts = {}
    eager = {1: find("local eager generate")}
    eager |= {rows: find("local eager decode", streams=rows) for rows in (8, 32)}
    for one in [each for each in _said if each["shape"] == shape]:
        if "tokens_per_s" not in one:
            continue
        parts = (one.get(name) for name in ("servers", "sessions", "streams", "context"))
        name = " ".join([one["what"], *(str(part) for part in parts if part is not None)])
        rows = one.get("sessions", one.get("streams", 1))
        facts = {"tokens_per_s": one["tokens_per_s"]}
        beside = eager.get(rows)
        if beside is not None and not one["what"].startswith("local eager"):
            facts["of_eager"] = round(one["tokens_per_s"] / beside["tokens_per_s"], 2)
        if copied is not None:
            passes = one["tokens_per_s"] / rows
            facts["of_bandwidth"] = round(passes * block_bytes(shape) / copied, 3)
        found[name] = facts
    prefill = find("local eager prefill")
    for one in [each for each in _said if each["shape"] == shape and prefill is not None]:
        took = one.get("first_token_ms") if one["what"] == "generate" else one.get("prefill_ms")
        if one.get("context") == PROMPT and one.get("sessions", 1) == 1 and took is not None:
            facts = {"ms": took, "of_eager": round(took / prefill["ms"], 2)}  # type: ignore[index]
            found[f"prompt {one['what']} {one['servers']}"] = facts
    say(shape, "summary", **{"in words": "name servers sessions context", **found})
