"""Tiny checkpoints whose weights are quantised, in formats that people publish, written by hand.

Each is a Llama (or gpt-oss) with random numbers where the format has numbers; what they stand for
is worked out beside them from the format's definition, and returned as a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "tie_word_embeddings": False,
}

Written = tuple[dict[str, torch.Tensor], torch.Tensor]


def written(
    folder: Path, write: Callable[[torch.Tensor, torch.Generator], Written], **config: Any
) -> Any:
    """Quantise the matrices of the blocks of a saved model; the model with what they stand for.

    Args:
        write: what takes the place of a weight, by its ending, and the values that it stands for.
        config: the ``quantization_config``; modules that its ``modules_to_not_convert`` names stay.
    """
    from transformers import AutoModelForCausalLM

    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    values = dict(model.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        module, _, ending = name.rpartition(".")
        kept = any(module.startswith(skip) for skip in config.get("modules_to_not_convert") or ())
        if ending != "weight" or tensor.ndim != 2 or ".layers." not in name or kept:
            found[name] = tensor
            continue
        parts, weight = write(tensor, generator)
        found |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        values[name].data.copy_(weight)
    save_file(found, file, metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"quantization_config": config}))
    return model


def fp8(weight: torch.Tensor, _: torch.Generator) -> Written:
    """DeepSeek's: 8-bit floats, a scale for each tile of 128 x 128."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    stored = torch.empty(weight.shape)
    values = torch.empty(weight.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            tile = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weight[tile].abs().max() / 448
            stored[tile] = (weight[tile] / scales[i, j]).to(torch.float8_e4m3fn).float()
            values[tile] = stored[tile] * scales[i, j]
    return {"weight": stored.to(torch.float8_e4m3fn), "weight_scale_inv": scales}, values


def _words(integers: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Eight 4-bit integers of a row in one of 32 bits, in this order from the lowest bits on."""
    rows = integers.to(torch.int64).reshape(integers.shape[0], -1, 8)
    words = sum(rows[..., column] << (4 * place) for place, column in enumerate(order))
    return torch.as_tensor(words).to(torch.int32)  # the highest bit is a sign there


def gptq(group: int = 32, act_order: bool = False) -> Callable[..., Written]:
    """GPTQ's first format: columns of integers, zeros that are stored less one."""

    def write(weight: torch.Tensor, generator: torch.Generator) -> Written:
        rows, columns = weight.shape
        integers = torch.randint(16, (columns, rows), generator=generator)
        zeros = torch.randint(1, 16, (columns // group, rows), generator=generator)
        scales = (torch.rand(zeros.shape, generator=generator) * 0.02 + 0.01).half()
        index = torch.arange(columns) // group
        if act_order:
            index = index[torch.randperm(columns, generator=generator)]
        values = (integers - zeros[index]) * scales.float()[index]
        straight = list(range(8))
        parts = {
            "qweight": _words(integers.t(), straight).t(),
            "qzeros": _words(zeros - 1, straight),
            "scales": scales,
            "g_idx": index.to(torch.int32),
        }
        return parts, values.t()

    return write


def awq(weight: torch.Tensor, generator: torch.Generator) -> Written:
    """AWQ's "gemm": rows of integers, the eight of a word interleaved."""
    rows, columns = weight.shape
    integers = torch.randint(16, (columns, rows), generator=generator)
    zeros = torch.randint(16, (columns // 32, rows), generator=generator)
    scales = (torch.rand(zeros.shape, generator=generator) * 0.02 + 0.01).half()
    index = torch.arange(columns) // 32
    values = (integers - zeros[index]) * scales.float()[index]
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    parts = {
        "qweight": _words(integers, order),
        "qzeros": _words(zeros, order),
        "scales": scales,
    }
    return parts, values.t()


def mxfp4(folder: Path) -> Path:
    """A gpt-oss as it is published: random experts in 4-bit floats, 32 of them with a scale."""
    from support.tiny import tiny_model

    path = tiny_model("gpt_oss", folder, hidden_size=64, intermediate_size=64)
    file, generator = path / "model.safetensors", torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        shape = experts, rows, columns // 32
        found[f"{name}_blocks"] = torch.randint(
            256, (*shape, 16), generator=generator, dtype=torch.uint8
        )
        # Exponents with a bias of 127.
        found[f"{name}_scales"] = torch.randint(
            121, 125, shape, generator=generator, dtype=torch.uint8
        )
    save_file(found, file, metadata={"format": "pt"})
    told = json.loads((path / "config.json").read_text())
    config = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (path / "config.json").write_text(json.dumps(told | {"quantization_config": config}))
    return path
