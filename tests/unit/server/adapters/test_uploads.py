"""Files of adapters, as hostile as they may be."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import torch
from safetensors.torch import save

from swarm_notebook.errors import BadRequest
from swarm_notebook.server.adapters.file import parse_safetensors


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
        "indices": torch.tensor([[1, 1 << 40]]),
        "flags": torch.tensor([True, False]),
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
    "an unknown dtype": file({"a": entry(dtype="C64")}, bytes(16)),
    "dtype of lists": file({"a": entry(dtype=[])}, bytes(16)),
    "NaN": save({"a": torch.tensor([1.0, torch.nan])}),
    "infinite": save({"a": torch.tensor([1.0, -torch.inf])}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str) -> None:
    with pytest.raises(BadRequest):
        parse_safetensors(uint8(BROKEN[name]))
