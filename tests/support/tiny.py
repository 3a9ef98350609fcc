"""Tiny random models of many families, saved as ordinary checkpoints.

`tiny_model(family, folder)` writes a model of one of `FAMILIES` with the features that set its
family apart: grouped queries, sliding windows, experts, ALiBi, biases, learned positions, layer
types that alternate. The weights depend on nothing but the family's name and `seed`. They are large
enough that the logits spread over several units: greedy tokens are no near-ties that rounding
could flip.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "qwen3_moe": {**GROUPED, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 32},
    "mistral": {**GROUPED, "sliding_window": 8},
    "mixtral": {**GROUPED, **EXPERTS, "num_local_experts": 4, "sliding_window": 8},
    "gemma2": {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        **GROUPED,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 6,
    },
    "phi3": {"num_key_value_heads": 2, "sliding_window": 8},
    "olmo2": {"num_key_value_heads": 2},
    "gpt_oss": {
        **GROUPED,
        **EXPERTS,
        "num_local_experts": 4,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
    },
    "gpt_neox": {},
    "falcon": {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "bloom": {"n_layer": 5, "n_head": 4},
    "gpt2": {"n_inner": 80},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 24},
}


def tiny_config(family: str, **changed: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changed})


def build(family: str, seed: int = 0, **changed: Any) -> Any:
    """The model itself, float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **changed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(family.encode()) + seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, parameter, noise))
    return model


def _scaled(name: str, parameter: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    if parameter.ndim < 2:
        # Norm weights and biases stay near their initial value (1 or 0), but are not equal to it.
        return parameter + 0.1 * noise
    if "emb" in name or "wte" in name or "wpe" in name:
        return 0.5 * noise
    return 1.5 * noise / parameter.shape[-1] ** 0.5


def tiny_model(family: str, folder: str | Path, seed: int = 0, **changed: Any) -> Path:
    """Save a tiny random model of `family` in `folder`/tiny-`family`; return that folder.

    Args:
        changed: fields of its config.
    """
    path = Path(folder) / f"tiny-{family}"
    build(family, seed, **changed).save_pretrained(path)
    return path
