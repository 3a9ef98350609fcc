"""Tensors on the wire: hivemind's `Tensor` protobuf, read with suspicion.

The format is hivemind's (proto/runtime.proto): raw little-endian elements, a dtype name and a
shape. We write bfloat16 as two bytes per element; hivemind's older form, which sends it as
float32, is recognised when reading by the length of the buffer.

`layout` believes nothing: an unknown dtype, a shape that does not match the bytes, or a compression
that we do not read is a `BadRequest` before any memory beyond the received bytes is taken. Who
expects a shape compares it with the layout before `unpack` takes memory for it. hivemind's lossy
compressions are in `codecs`. Ours is `INT8`: values as int8, every 16 neighbours of the last
dimension scaled by the largest of them, and behind all values the scales as bfloat16. (A few
channels of hidden states are a hundred times larger than the rest: a scale for the whole row would
spoil all others.) Only peers that announce our protocol are sent it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hivemind.proto import runtime_pb2

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import codecs

NONE = runtime_pb2.CompressionType.NONE
FLOAT16 = runtime_pb2.CompressionType.FLOAT16
INT8 = 64  # of no type that hivemind knows; the enumeration is open
COMPRESSIONS = {"float16": FLOAT16, "int8": INT8}

# Deep prompts have most: blocks, batch, length, hidden.
MAX_DIMENSIONS = 6
# Far more than any frame holds, and far from where torch's own arithmetic of sizes overflows.
MAX_ELEMENTS = 1 << 34
INT8_GROUP = 16
# 8-bit values are multiplied out in pieces of about so many elements: 4 MiB of float32, in which a
# group that is not full still takes a whole one.
_PIECE_ELEMENTS = 1 << 20

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
    """`tensor` as a protobuf; ``compression`` is `NONE`, `FLOAT16`, `INT8` or of `codecs`."""
    if compression in codecs.CODECS:
        packed = codecs.pack(tensor, compression)
        return pack(tensor) if packed is None else packed
    # Once per token on every server: what the common case does not need is left out.
    raw = tensor.detach() if tensor.requires_grad else tensor
    if compression == FLOAT16:
        raw = raw.to(torch.float16)
    if not raw.is_cpu:
        raw = raw.cpu()
    if compression == INT8:
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
    if compression == INT8:
        return width + 2 * -(-width // INT8_GROUP)
    sizes = [ours.itemsize]
    if theirs in _DTYPES:
        sizes.append(_DTYPES[theirs].itemsize)
    if compression == FLOAT16:
        sizes.append(torch.float16.itemsize)
    return width * min(sizes)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a tensor in a protobuf will be when it is unpacked.

    Attributes:
        stored: the dtype of the bytes in the buffer; int8 for `INT8`, uint8 for `codecs`.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: torch.dtype


def layout(message: runtime_pb2.Tensor) -> Layout:
    """The layout of a tensor, whose bytes are as many as it needs; takes no memory that stays.

    Raises:
        BadRequest: unknown dtype or compression, sizes that no tensor has, or bytes that do not
            match the shape.
    """
    return _layout(message, message.buffer)


def _layout(message: runtime_pb2.Tensor, buffer: bytes) -> Layout:
    # The buffer comes apart: protobuf copies it whenever it is asked for it.
    dtype = dtype_from_name(message.dtype)
    dimensions = len(message.size)
    if dimensions > MAX_DIMENSIONS:
        raise BadRequest(f"a tensor has {dimensions} dimensions, at most {MAX_DIMENSIONS} are read")
    shape = tuple(message.size)
    # Without elements no bytes tell, but torch multiplies the other sizes.
    if 0 in shape and math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise BadRequest(f"no tensor that is read here has the shape {list(shape)}")
    if message.compression == INT8:
        _check_int8(len(buffer), shape, dtype)
        return Layout(dtype, shape, torch.int8)
    if message.compression in codecs.CODECS:
        codecs.check(message.compression, buffer, shape, dtype)
        return Layout(dtype, shape, torch.uint8)
    return Layout(dtype, shape, _stored_dtype(message, len(buffer), dtype, math.prod(shape)))


def is_file(message: runtime_pb2.Tensor) -> bool:
    """Whether a tensor is nothing but bytes, as a file travels; takes no memory.

    Raises: as `layout`.
    """
    found = layout(message)
    return found.dtype == found.stored == torch.uint8 and len(found.shape) == 1


def unpack(message: runtime_pb2.Tensor, found: Layout | None = None) -> torch.Tensor:
    """The tensor in a protobuf, as an own writable CPU tensor.

    Args:
        found: its `layout`, if somebody has asked for it.

    Raises: as `layout`.
    """
    buffer = message.buffer
    found = found or _layout(message, buffer)
    if not buffer:
        return torch.empty(found.shape, dtype=found.dtype)
    if found.stored is torch.int8:
        return _from_int8(buffer, found.shape, found.dtype)
    if message.compression in codecs.CODECS:
        return codecs.unpack(message.compression, buffer, found.shape, found.dtype)
    tensor = torch.frombuffer(bytearray(buffer), dtype=found.stored).reshape(found.shape)
    return tensor if found.stored == found.dtype else tensor.to(found.dtype)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # A finite sum says so in one pass; an infinite one may also have overflowed.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _stored_dtype(
    message: runtime_pb2.Tensor, size: int, dtype: torch.dtype, elements: int
) -> torch.dtype:
    """The dtype of the bytes in the buffer, checked against their number."""
    if message.compression == FLOAT16:
        candidates = [torch.float16]
    elif message.compression == NONE:
        candidates = [dtype, torch.float32] if dtype == torch.bfloat16 else [dtype]
    else:
        raise BadRequest(
            f"compression {message.compression} is not read here, send NONE ({NONE}), "
            f"FLOAT16 ({FLOAT16}) or 8-bit values ({INT8})"
        )
    for candidate in candidates:
        if elements * candidate.itemsize == size:
            return candidate
    raise BadRequest(
        f"a {message.dtype} tensor of shape {list(message.size)} needs "
        f"{elements * candidates[0].itemsize} bytes, its buffer has {size}"
    )


def _to_int8(tensor: torch.Tensor) -> bytes:
    groups = _in_groups(tensor.to(torch.float32))
    scales = (groups.abs().amax(dim=-1, keepdim=True) / 127.0).to(torch.bfloat16)
    # A group of zeros has scale 0, and stays one.
    divisors = scales.to(torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (groups / divisors).round().clamp(-127, 127).to(torch.int8)
    values = scaled.flatten(-2)[..., : tensor.shape[-1]].contiguous()
    return values.numpy().tobytes() + scales.view(torch.int16).numpy().tobytes()


def _check_int8(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not shape or not dtype.is_floating_point:
        raise BadRequest(f"a {dtype} tensor of shape {list(shape)} cannot be 8-bit values")
    elements, groups = math.prod(shape), math.prod(shape[:-1]) * -(-shape[-1] // INT8_GROUP)
    if size != elements + 2 * groups:
        raise BadRequest(
            f"8-bit values of shape {list(shape)} need {elements} + 2 * {groups} bytes, the "
            f"buffer has {size}"
        )


def _from_int8(buffer: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    elements, width = math.prod(shape), shape[-1]
    own = bytearray(buffer)
    values = torch.frombuffer(own, dtype=torch.int8, count=elements).reshape(-1, width)
    # A copy: the scales may begin at an odd byte.
    scales = torch.frombuffer(own[elements:], dtype=torch.bfloat16).reshape(len(values), -1, 1)
    result = torch.empty(values.shape, dtype=dtype)
    rows = max(1, _PIECE_ELEMENTS // (scales.shape[1] * INT8_GROUP))
    for piece, scale, into in zip(
        values.split(rows), scales.split(rows), result.split(rows), strict=True
    ):
        whole = _in_groups(piece.to(torch.float32)) * scale.to(torch.float32)
        into.copy_(whole.flatten(-2)[:, :width])
    return result.reshape(shape)


def _in_groups(tensor: torch.Tensor) -> torch.Tensor:
    """The last dimension as groups, the last of them filled up with zeros."""
    missing = -tensor.shape[-1] % INT8_GROUP
    return torch.nn.functional.pad(tensor, (0, missing)).unflatten(-1, (-1, INT8_GROUP))


def split(message: runtime_pb2.Tensor, part_bytes: int) -> list[runtime_pb2.Tensor]:
    """`message` cut into parts of at most ``part_bytes``, as hivemind streams large tensors.

    The first part carries dtype, shape and the number of parts, the others only bytes.
    """
    buffer = message.buffer
    count = max(1, math.ceil(len(buffer) / part_bytes))
    first = runtime_pb2.Tensor(
        buffer=buffer[:part_bytes],
        size=message.size,
        requires_grad=message.requires_grad,
        dtype=message.dtype,
        compression=message.compression,
        chunks=count,
    )
    rest = [
        runtime_pb2.Tensor(buffer=buffer[offset : offset + part_bytes])
        for offset in range(part_bytes, len(buffer), part_bytes)
    ]
    return [first, *rest]


def join(parts: list[runtime_pb2.Tensor]) -> list[runtime_pb2.Tensor]:
    """The tensors of a sequence of `split` parts; a part with a dtype begins a new tensor."""
    tensors: list[runtime_pb2.Tensor] = []
    buffers_of: list[list[bytes]] = []
    for part in parts:
        if part.dtype:
            tensors.append(part)
            buffers_of.append([part.buffer])
        elif not tensors:
            raise BadRequest("a stream of tensor parts begins without a dtype")
        else:
            buffers_of[-1].append(part.buffer)
    for tensor, buffers in zip(tensors, buffers_of, strict=True):
        if tensor.chunks > 1 and tensor.chunks != len(buffers):
            raise BadRequest(f"a tensor announced {tensor.chunks} parts, {len(buffers)} came")
        if len(buffers) > 1:
            tensor.buffer = b"".join(buffers)
    return tensors
