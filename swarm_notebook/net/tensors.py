"""Tensors on the wire: hivemind's `Tensor` protobuf, read with suspicion.

The format is hivemind's (proto/runtime.proto): raw little-endian elements, a dtype name and a
shape. We write bfloat16 as two bytes per element; hivemind's older form, which sends it as
float32, is recognised when reading by the length of the buffer.

`unpack` believes nothing: an unknown dtype, a shape that does not match the bytes, or a
compression that we do not read is a `BadRequest` before any memory beyond the received bytes is
taken. hivemind's 8-bit compressions are not read: 1.1.12 cannot decode them with numpy >= 2.4.
Ours is `ROW_INT8`: every row (the last dimension) as int8, scaled by its largest magnitude, and
behind all rows their scales as float32. Only peers that announce our protocol are sent it.
"""

from __future__ import annotations

import math

import torch
from hivemind.proto import runtime_pb2

from swarm_notebook.errors import BadRequest

NONE = runtime_pb2.CompressionType.NONE
FLOAT16 = runtime_pb2.CompressionType.FLOAT16
ROW_INT8 = 64  # of no type that hivemind knows; the enumeration is open
COMPRESSIONS = {"float16": FLOAT16, "int8": ROW_INT8}

MAX_DIMENSIONS = 6

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_from_name(name: str) -> torch.dtype:
    """The torch dtype of a wire name such as ``"bfloat16"``."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise BadRequest(f"dtype {name[:40]!r} is not one of {', '.join(_DTYPES)}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """The wire name of a torch dtype."""
    return _NAMES[dtype]


def pack(tensor: torch.Tensor, compression: int = NONE) -> runtime_pb2.Tensor:
    """`tensor` as a protobuf; ``compression`` is `NONE`, `FLOAT16` or `ROW_INT8`."""
    # Once per token on every server: what the common case does not need is left out.
    raw = tensor.detach() if tensor.requires_grad else tensor
    if compression == FLOAT16:
        raw = raw.to(torch.float16)
    if not raw.is_cpu:
        raw = raw.cpu()
    if compression == ROW_INT8:
        return runtime_pb2.Tensor(
            buffer=_to_int8(raw),
            size=tensor.shape,
            dtype=_NAMES[tensor.dtype],
            compression=compression,
        )
    if raw.dtype == torch.bfloat16:
        raw = raw.view(torch.int16)
    return runtime_pb2.Tensor(
        buffer=raw.numpy().tobytes(),
        size=tensor.shape,
        dtype=_NAMES[tensor.dtype],
        compression=compression,
        requires_grad=False,
    )


def state_bytes(width: int, ours: torch.dtype, theirs: str | None, compression: int) -> int:
    """Bytes of one hidden state on the wire, which is no wider than both sides compute in.

    Args:
        width: how many values it has.
        theirs: wire name of what the server computes in; None if it does not say.
    """
    if compression == ROW_INT8:
        return width + 4
    sizes = [ours.itemsize]
    if theirs in _DTYPES:
        sizes.append(_DTYPES[theirs].itemsize)
    if compression == FLOAT16:
        sizes.append(torch.float16.itemsize)
    return width * min(sizes)


def unpack(message: runtime_pb2.Tensor) -> torch.Tensor:
    """The tensor in a protobuf, as an own writable CPU tensor.

    Raises:
        BadRequest: unknown dtype or compression, or bytes that do not match the shape.
    """
    dtype = dtype_from_name(message.dtype)
    shape = tuple(message.size)
    if len(shape) > MAX_DIMENSIONS:
        raise BadRequest(f"a tensor has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    if message.compression == ROW_INT8:
        return _from_int8(message.buffer, shape, dtype)
    stored = _stored_dtype(message, dtype, math.prod(shape))
    if not message.buffer:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(bytearray(message.buffer), dtype=stored).reshape(shape)
    return tensor if stored == dtype else tensor.to(dtype)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # A finite sum says so in one pass; an infinite one may also have overflowed.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _stored_dtype(message: runtime_pb2.Tensor, dtype: torch.dtype, elements: int) -> torch.dtype:
    """The dtype of the bytes in the buffer, checked against their number."""
    if message.compression == FLOAT16:
        candidates = [torch.float16]
    elif message.compression == NONE:
        candidates = [dtype, torch.float32] if dtype == torch.bfloat16 else [dtype]
    else:
        raise BadRequest(
            f"compression {message.compression} is not read here, send NONE ({NONE}), "
            f"FLOAT16 ({FLOAT16}) or 8-bit rows ({ROW_INT8})"
        )
    for candidate in candidates:
        if elements * candidate.itemsize == len(message.buffer):
            return candidate
    raise BadRequest(
        f"a {message.dtype} tensor of shape {list(message.size)} needs "
        f"{elements * candidates[0].itemsize} bytes, its buffer has {len(message.buffer)}"
    )


def _to_int8(tensor: torch.Tensor) -> bytes:
    values = tensor.to(torch.float32)
    scales = values.abs().amax(dim=-1, keepdim=True) / 127.0
    # A row of zeros has scale 0, and stays one.
    quantised = (values / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return quantised.numpy().tobytes() + scales.numpy().tobytes()


def _from_int8(buffer: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if not shape or not dtype.is_floating_point:
        raise BadRequest(f"a {dtype} tensor of shape {list(shape)} cannot be 8-bit rows")
    elements, rows = math.prod(shape), math.prod(shape[:-1])
    if len(buffer) != elements + 4 * rows:
        raise BadRequest(
            f"8-bit rows of shape {list(shape)} need {elements} + 4 * {rows} bytes, the buffer "
            f"has {len(buffer)}"
        )
    if not elements:
        return torch.empty(shape, dtype=dtype)
    own = bytearray(buffer)
    quantised = torch.frombuffer(own, dtype=torch.int8, count=elements).reshape(shape)
    # A copy: the scales may begin at any byte.
    scales = torch.frombuffer(own[elements:], dtype=torch.float32).reshape(*shape[:-1], 1)
    return (quantised.to(torch.float32) * scales).to(dtype)


def split(message: runtime_pb2.Tensor, part_bytes: int) -> list[runtime_pb2.Tensor]:
    """`message` cut into parts of at most ``part_bytes``, as hivemind streams large tensors.

    The first part carries dtype, shape and the number of parts, the others only bytes.
    """
    buffer = message.buffer
    count = max(1, math.ceil(len(buffer) / part_bytes))
    first = runtime_pb2.Tensor()
    first.CopyFrom(message)
    first.buffer, first.chunks = buffer[:part_bytes], count
    rest = [
        runtime_pb2.Tensor(buffer=buffer[offset : offset + part_bytes])
        for offset in range(part_bytes, len(buffer), part_bytes)
    ]
    return [first, *rest]


def join(parts: list[runtime_pb2.Tensor]) -> list[runtime_pb2.Tensor]:
    """The tensors of a sequence of `split` parts; a part with a dtype begins a new tensor."""
    tensors: list[runtime_pb2.Tensor] = []
    pieces: list[list[bytes]] = []
    for part in parts:
        if part.dtype:
            tensors.append(part)
            pieces.append([part.buffer])
        elif not tensors:
            raise BadRequest("a stream of tensor parts begins without a dtype")
        else:
            pieces[-1].append(part.buffer)
    for tensor, buffers in zip(tensors, pieces, strict=True):
        if tensor.chunks > 1 and tensor.chunks != len(buffers):
            raise BadRequest(f"a tensor announced {tensor.chunks} parts, {len(buffers)} came")
        if len(buffers) > 1:
            tensor.buffer = b"".join(buffers)
    return tensors
