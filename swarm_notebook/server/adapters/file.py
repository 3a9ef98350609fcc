"""The parameters of an uploaded adapter: a safetensors file, read without trusting it.

The format: eight bytes of length, that many bytes of JSON (name to dtype, shape and offsets), and
the data. Everything is checked against the bytes that came before a tensor is made, and tensors
are views of these bytes: reading takes no memory.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from swarm_notebook.errors import BadRequest

# Of an adapter with every linear layer of 126 blocks: 1,764 tensors, 240 kB of header.
MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 1 << 14
MAX_DIMENSIONS = 4

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
_LENGTH_BYTES = 8
_SHOWN = 120


def parse_safetensors(file: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors in a file, by name, as views of it.

    Raises:
        BadRequest: it is no safetensors file, or a number in it is NaN or infinite.
    """
    if file.dtype != torch.uint8 or file.dim() != 1 or len(file) < _LENGTH_BYTES:
        raise BadRequest("adapter file: expected one uint8 tensor, the bytes of a safetensors file")
    length = int.from_bytes(bytes(file[:_LENGTH_BYTES].tolist()), "little")
    if length > min(len(file) - _LENGTH_BYTES, MAX_HEADER_BYTES):
        raise BadRequest(f"adapter file: a header of {length} bytes in a file of {len(file)}")
    begin = _LENGTH_BYTES + length
    header = _parse_header(bytes(file[_LENGTH_BYTES:begin].numpy()))
    data = file[begin:]
    found, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
        found[name] = _tensor(name, entry, data, position)
        position = _offsets(name, entry)[1]
    if position != len(data):
        raise BadRequest(f"adapter file: {len(data)} bytes of data, its header tells of {position}")
    return found


def _parse_header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"adapter file: the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise BadRequest("adapter file: the header is not a dict of tensors")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise BadRequest(f"adapter file: {len(header)} tensors, at most {MAX_TENSORS} are read")
    return header


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
    ):
        raise BadRequest(f"adapter file: no data_offsets of {name[:_SHOWN]!r}")
    return offsets[0], offsets[1]


def _tensor(name: str, entry: dict[str, Any], data: torch.Tensor, position: int) -> torch.Tensor:
    """One tensor, whose bytes must begin at ``position``."""
    begin, end = _offsets(name, entry)
    dtype, shape = _DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
    if dtype is None:
        raise BadRequest(
            f"{name[:_SHOWN]}: dtype {str(entry.get('dtype'))[:_SHOWN]!r}, expected one of "
            f"{', '.join(_DTYPES)}"
        )
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape)
    ):
        raise BadRequest(f"{name[:_SHOWN]}: shape {str(shape)[:_SHOWN]}")
    if begin != position or end - begin != math.prod(shape) * dtype.itemsize or end > len(data):
        raise BadRequest(
            f"{name[:_SHOWN]}: bytes {begin} to {end} of {len(data)}, expected "
            f"{math.prod(shape) * dtype.itemsize} bytes from {position}"
        )
    piece = data[begin:end]
    if piece.storage_offset() % dtype.itemsize:
        piece = piece.clone()  # tensors begin at multiples of their element's size
    tensor = piece.view(dtype).reshape(shape)
    # The largest magnitude is NaN or infinite if any value is.
    if dtype.is_floating_point and tensor.numel() and not math.isfinite(float(tensor.abs().max())):
        raise BadRequest(f"{name[:_SHOWN]}: a value is NaN or infinite")
    return tensor
