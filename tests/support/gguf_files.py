"""GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of Q and K rows: the halves that rotate together are interleaved."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def write_gguf(
    path: Path, model: Any, architecture: str, *, kind: Any = None, **options: Any
) -> None:
    """Write a model as llama.cpp's converter does.

    Args:
        architecture: llama.cpp's name of it.
        kind: the type of its matrices; float32 if it is None.
        options: for ``GGUFWriter``.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if experts := getattr(config, "num_experts", 0):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_tokenizer_model("gpt2")
    # What the merge is made of has to be there: connecting reads the tokenizer.
    words = ["a", "b", "ab"]
    words += [f"t{i}" for i in range(len(words), config.vocab_size)]
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    known = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        _add(_Quantising(writer, kind), table, name, tensor.numpy(), config, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Quantising:
    """A writer that stores matrices in a type."""

    def __init__(self, writer: Any, kind: Any):
        self._writer, self._kind = writer, kind

    def add_tensor(self, name: str, value: np.ndarray) -> None:
        if self._kind is None or value.ndim < 2:
            self._writer.add_tensor(name, value)
            return
        stored = gguf.quants.quantize(value, self._kind)
        self._writer.add_tensor(name, stored, raw_dtype=self._kind)


def _add(
    writer: Any, table: Any, name: str, value: np.ndarray, config: Any, architecture: str
) -> None:
    if name.endswith("experts.gate_up_proj"):
        block = name.split(".")[2]
        gate, up = np.split(value, 2, axis=1)
        writer.add_tensor(f"blk.{block}.ffn_gate_exps.weight", np.ascontiguousarray(gate))
        writer.add_tensor(f"blk.{block}.ffn_up_exps.weight", np.ascontiguousarray(up))
        return
    stem = name.removesuffix(".weight")
    if architecture == "llama" and stem.endswith("q_proj"):
        value = _permuted(value, config.num_attention_heads)
    if architecture == "llama" and stem.endswith("k_proj"):
        value = _permuted(value, config.num_key_value_heads)
    writer.add_tensor(f"{table.get_name(stem)}.weight", np.ascontiguousarray(value))
