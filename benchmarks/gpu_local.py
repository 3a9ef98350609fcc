"""The shapes that `gpu` measures, and transformers by itself at them, in processes of their own."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

CONTEXT, WARM = 448, 8
PROMPT, NEW_TOKENS, LOCAL_STEPS = 2048, 48, 24
# An end that is looked for, as in every text, and never comes. To forbid one (`min_new_tokens`)
# costs transformers some 0.3 ms a token, which no reader of a text pays.
NEVER = 1 << 30
LORA_RANK, LORA_TARGETS = 8, ("q_proj", "v_proj")
# Texts, tokens of a prompt, tokens after it whose distributions are compared.
KL_ROWS, KL_PROMPT, KL_TOKENS = 8, 64, 32
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 30},
    # 137 GB of blocks: of two cards or more.
    "70b-whole": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
}
HEADS = {"tiny": (4, 2), "1b": (32, 8), "8b": (32, 8), "70b": (64, 8), "70b-whole": (64, 8)}


def say(shape: str, what: str, **facts: Any) -> None:
    print(json.dumps({"shape": shape, "what": what, **facts}), flush=True)


def config(shape: str) -> Any:
    from transformers import LlamaConfig

    heads, groups = HEADS[shape]
    made = LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=1024 if shape == "tiny" else 128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    made.dtype = "bfloat16"
    made.architectures = ["LlamaForCausalLM"]
    return made


def sync(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def made(shape: str, device: str) -> Any:
    """A model of random weights in bfloat16."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):  # for this alone: all calls within would take longer
        return LlamaForCausalLM(config(shape)).eval()


def eager(shape: str, device: str) -> None:
    """As users have it: transformers' own caches and kernels."""
    import torch
    from transformers import DynamicCache

    model = made(shape, device)
    ids = torch.randint(3, 1000, (1, PROMPT), device=device)
    with torch.inference_mode():
        for _ in range(2):
            sync(device)
            began = time.perf_counter()
            model.model(ids)
            sync(device)
            took = time.perf_counter() - began
        say(shape, "local eager prefill", tokens=PROMPT, ms=round(1000 * took, 1))
        rate = statistics.median(_generated(model, ids[:, :CONTEXT], device) for _ in range(3))
        say(shape, "local eager generate", streams=1, tokens_per_s=round(rate, 1))
        for rows in (1, 8, 32):
            cache = DynamicCache(config=model.config)
            hidden = torch.randn(rows, CONTEXT, model.config.hidden_size, device=device)
            model.model(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
            for step in range(LOCAL_STEPS + WARM):
                if step == WARM:
                    sync(device)
                    began = time.perf_counter()
                model.model(inputs_embeds=hidden[:, :1], past_key_values=cache, use_cache=True)
            sync(device)
            rate = rows * LOCAL_STEPS / (time.perf_counter() - began)
            say(shape, "local eager decode", streams=rows, tokens_per_s=round(rate, 1))


def static(shape: str, device: str) -> None:
    """With a static cache, for which transformers compiles the model (on a card only)."""
    import torch

    model = made(shape, device)
    ids = torch.randint(3, 1000, (1, CONTEXT), device=device)
    began = time.perf_counter()
    _generated(model, ids, device, cache_implementation="static")
    first = time.perf_counter() - began
    rates = [_generated(model, ids, device, cache_implementation="static") for _ in range(3)]
    rate = round(statistics.median(rates), 1)
    say(shape, "local static generate", streams=1, tokens_per_s=rate, first_s=round(first, 1))


def _generated(model: Any, ids: Any, device: str, **more: Any) -> float:
    """Tokens per second of a text, its prompt included."""
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": NEVER, "do_sample": False}
    began = time.perf_counter()
    model.generate(ids, pad_token_id=0, **options, **more)
    sync(device)
    return NEW_TOKENS / (time.perf_counter() - began)


def divergence(shape: str, folder: Path, found: Path, device: str) -> None:
    """How far a swarm's distributions are from local sdpa, beside those of local eager attention.

    Args:
        folder: of the model; with random weights, its config.
        found: what `torch.save` made of a swarm's sequences and logits.
    """
    import torch
    from torch.nn.functional import kl_div, log_softmax
    from transformers import AutoModelForCausalLM

    from swarm_notebook.checkpoint.files.dummy import PREFIX, DummyWeights

    if folder.name.startswith(PREFIX):
        model = made(shape, device)
        weights = DummyWeights(config(shape))
        lazy = weights.lazy(weights.names())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(lazy[name][:])
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model = model.eval().to(device)
    swarms = torch.load(found, weights_only=True)
    sequences = swarms["sequences"].to(device)

    def steps() -> Any:
        """Logits of what follows the prompt, a token at a time, as the swarm computed them."""
        first = model(sequences[:, :KL_PROMPT], use_cache=True, logits_to_keep=1)
        logits = [first.logits]
        for position in range(KL_PROMPT, sequences.shape[1] - 1):
            token = sequences[:, position : position + 1]
            logits.append(model(token, past_key_values=first.past_key_values).logits)
        return log_softmax(torch.cat(logits, 1).float(), -1)

    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        sdpa = steps()
        model.set_attn_implementation("eager")
        others = {
            "server": log_softmax(swarms["logits"].to(device).float(), -1),
            "eager": steps(),
        }
        facts = {}
        for name, other in others.items():
            apart = kl_div(other, sdpa, reduction="none", log_target=True).sum(-1)
            facts[f"kl_{name}"] = float(f"{apart.mean().item():.3g}")
            facts[f"kl_{name}_worst"] = float(f"{apart.max().item():.3g}")
    say(shape, "divergence from local sdpa", model=folder.name, tokens=apart.numel(), **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("eager", "static", "divergence"))
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--device")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--found", type=Path)
    options = parser.parse_args()
    if options.work == "divergence":
        divergence(options.shape, options.folder, options.found, options.device)
    else:
        {"eager": eager, "static": static}[options.work](options.shape, options.device)


if __name__ == "__main__":
    main()
