"""Configs and files of adapters, as hostile as they may be."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import torch
from safetensors.torch import save

from swarm_notebook.errors import BadRequest
from swarm_notebook.server.adapters.config import parse_configs
from swarm_notebook.server.adapters.file import parse_safetensors

NAME = "model.layers.1.self_attn.q_proj.lora_A.default.weight"


def config(**fields: Any) -> str:
    return json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **fields})


ACCEPTED: dict[str, dict[str, Any]] = {
    "as PEFT writes it": {
        "bias": "none",
        "megatron_core": "megatron.core",
        "layer_replication": None,
    },
    "patterns": {"rank_pattern": {r"^model\.layers\.(1|2)\..*q_proj": 8, "v_proj": 2}},
    "init": {"init_lora_weights": "gaussian"},
    "where it came from": {"auto_mapping": {"base": "x"}, "base_model_name_or_path": "/etc/passwd"},
    "heads": {"modules_to_save": ["score"]},
}


REFUSED: dict[str, tuple[Any, str]] = {
    "no dict": ("LORA", "configs"),
    "empty": ({}, "configs"),
    "too many": ({f"a{index}": config() for index in range(17)}, "configs"),
    "a name of dots": ({"a.b": config()}, "no name"),
    "a name that is a number": ({"3": config()}, "no name"),
    "no text": ({"default": {"r": 4}}, "expected JSON"),
    "no JSON": ({"default": "{"}, "no JSON"),
    "deep JSON": ({"default": "[" * 100_000}, "no JSON"),
    "no config": ({"default": "[]"}, "a list"),
    "no type": ({"default": "{}"}, "peft_type"),
    "another type": ({"default": config(peft_type="PREFIX_TUNING")}, "peft_type"),
    "a type of lists": ({"default": config(peft_type=["LORA"])}, "peft_type"),
    "types mixed": ({"a": config(), "b": '{"peft_type": "IA3"}'}, "share one"),
    "rank too large": ({"default": config(r=257)}, "a rank from 1 to 256"),
    "rank zero": ({"default": config(r=0)}, "a rank"),
    "rank of text": ({"default": config(r="4")}, "a rank"),
    "a rank in a pattern": ({"default": config(rank_pattern={"q_proj": 1 << 40})}, "a rank"),
    "a slow pattern": ({"default": config(rank_pattern={"(a*)*b": 4})}, "rank_pattern"),
    "another slow pattern": ({"default": config(rank_pattern={".*.*.*.*x": 4})}, "rank_pattern"),
    "a broken pattern": ({"default": config(alpha_pattern={"(": 4})}, "regular expression"),
    "alpha infinite": ({"default": config(lora_alpha=float("inf"))}, "finite"),
    "dropout": ({"default": config(lora_dropout=2)}, "a probability"),
    "biases": ({"default": config(bias="all")}, "biases"),
    "pissa": ({"default": config(init_lora_weights="pissa")}, "initialisation"),
    "no parameters": ({"default": config(target_parameters=["(a*)*"])}, "names of parameters"),
    "megatron": ({"default": config(megatron_config={"a": 1})}, "megatron_config"),
    "layers twice": ({"default": config(layer_replication=[[0, 4]])}, "layer_replication"),
    "something new": ({"default": config(remote_code="http://")}, "remote_code"),
    "feedforward": (
        {"default": '{"peft_type": "IA3", "feedforward_modules": "(.*a)*"}'},
        "feedforward_modules",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_configs_accepted(name: str) -> None:
    (parsed,) = parse_configs({"default": config(**ACCEPTED[name])}, 256)
    assert parsed.values["r"] == 4
    assert not parsed.values.keys() & {"target_modules", "auto_mapping", "modules_to_save"}
    assert parsed.values.get("init_lora_weights", True) is True


@pytest.mark.parametrize("name", REFUSED)
def test_configs_refused(name: str) -> None:
    value, message = REFUSED[name]
    with pytest.raises(BadRequest, match=message):
        parse_configs(value, 256)


def uint8(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any = (2, 2), begin: Any = 0, end: Any = 16, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_files_are_read_as_they_were_written() -> None:
    tensors = {
        "b": torch.randn(3, 4),
        "a": torch.randn(5, dtype=torch.bfloat16),
        "c": torch.randn(2, 1, 2, dtype=torch.float16),
        "empty": torch.empty(0, 3),
    }
    found = parse_safetensors(uint8(save(tensors, {"format": "pt"})))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    odd = parse_safetensors(uint8(file({"a": entry([1], 0, 4)}, b"\0\0\x80\x3f")))
    assert odd["a"].tolist() == [1.0]


BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "short": b"abc",
    "a header longer than the file": struct.pack("<Q", 1 << 60) + b"{}",
    "no JSON": file(b"{]"),
    "deep JSON": file(b"[" * 100_000),
    "no dict": file([1]),
    "an entry of no dict": file({"a": 3}),
    "no offsets": file({"a": {"dtype": "F32", "shape": [2]}}),
    "offsets of floats": file({"a": entry(begin=0.0)}, bytes(16)),
    "beyond the end": file({"a": entry(shape=[1 << 20, 1 << 20], end=1 << 42)}, bytes(16)),
    "huge shape": file({"a": entry(shape=[1 << 31, 1 << 31])}, bytes(16)),
    "negative shape": file({"a": entry(shape=[-2, -2])}, bytes(16)),
    "many dimensions": file({"a": entry(shape=[1] * 9 + [4])}, bytes(16)),
    "other size than shape": file({"a": entry(shape=[3, 2])}, bytes(16)),
    "a hole": file({"a": entry(begin=4, end=20)}, bytes(20)),
    "overlap": file({"a": entry(), "b": entry(begin=8, end=24)}, bytes(24)),
    "a rest": file({"a": entry()}, bytes(20)),
    "truncated": file({"a": entry()}, bytes(12)),
    "whole numbers": file({"a": entry(dtype="I32")}, bytes(16)),
    "dtype of lists": file({"a": entry(dtype=[])}, bytes(16)),
    "NaN": save({"a": torch.tensor([1.0, torch.nan])}),
    "infinite": save({"a": torch.tensor([1.0, -torch.inf])}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str) -> None:
    with pytest.raises(BadRequest):
        parse_safetensors(uint8(BROKEN[name]))
