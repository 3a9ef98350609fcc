"""Tensors on the wire, read with suspicion.

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
from dataclasses import dataclass, replace

import numpy as np
import torch
from hivemind.proto import runtime_pb2

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import codecs
from swarm_notebook.net.wire.message import LARGE_BYTES, Buffer, PackedTensor

NONE = runtime_pb2.CompressionType.NONE
FLOAT16 = runtime_pb2.CompressionType.FLOAT16
INT8 = 64  # of no type that hivemind knows; the enumeration is open
COMPRESSIONS = {"float16": FLOAT16, "int8": INT8}

# Far more than any frame holds, and far from where torch's own arithmetic of sizes overflows.
MAX_ELEMENTS = 1 << 34
INT8_GROUP = 16
# Measured on two cores of a shared x86 machine: up to here the slowest of all, packing as 8-bit
# values, takes 0.2 ms, and going from a loop to a thread and back 0.06 to 0.13 ms; 1 MiB takes 1.4
# to 3 ms, and 16 MiB 100 ms.
INLINE_BYTES = 128 << 10
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


def float_dtype(name: str | None) -> torch.dtype | None:
    """What blocks compute in, by its wire name; None for what blocks do not."""
    dtype = _DTYPES.get(name or "")
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else None


def dtype_name(dtype: torch.dtype) -> str:
    """The wire name of a torch dtype."""
    return _NAMES[dtype]


def pack(tensor: torch.Tensor, compression: int = NONE) -> PackedTensor:
    """`tensor` for the wire; ``compression`` is `NONE`, `FLOAT16`, `INT8` or of `codecs`.

    A large one that is on the CPU, contiguous and not compressed is not copied: nobody may write
    to it until it has left.
    """
    if compression in codecs.CODECS:
        found = codecs.pack(tensor, compression)
        return pack(tensor) if found is None else PackedTensor.of(found)
    # Once per token on every server: what the common case does not need is left out.
    raw = tensor.detach() if tensor.requires_grad else tensor
    if compression == FLOAT16:
        raw = raw.to(torch.float16)
    if not raw.is_cpu:
        raw = raw.cpu()
    buffer = _to_int8(raw) if compression == INT8 else _bytes(raw)
    return PackedTensor(buffer, tuple(tensor.shape), _NAMES[tensor.dtype], compression)


def _bytes(raw: torch.Tensor) -> Buffer:
    """The elements of a tensor: a copy if they are few, else its own memory where that will do."""
    if raw.dtype == torch.bfloat16:
        raw = raw.view(torch.int16)
    if raw.nbytes < LARGE_BYTES:
        return raw.numpy().tobytes()
    return raw.contiguous().numpy().data.toreadonly().cast("B")


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
class TensorLayout:
    """What a tensor on the wire will be when it is unpacked.

    Attributes:
        stored: the dtype of the bytes in the buffer; int8 for `INT8`, uint8 for `codecs`.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: torch.dtype


def layout(packed: PackedTensor) -> TensorLayout:
    """The layout of a tensor, whose bytes are as many as it needs; takes no memory that stays.

    Raises:
        BadRequest: unknown dtype or compression, sizes that no tensor has, or bytes that do not
            match the shape.
    """
    dtype, shape, buffer = dtype_from_name(packed.dtype), packed.size, packed.buffer
    # Without elements no bytes tell, but torch multiplies the other sizes.
    if 0 in shape and math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise BadRequest(f"no tensor that is read here has the shape {list(shape)}")
    if packed.compression == INT8:
        _check_int8(len(buffer), shape, dtype)
        return TensorLayout(dtype, shape, torch.int8)
    if packed.compression in codecs.CODECS:
        codecs.check(packed.compression, buffer, shape, dtype)
        return TensorLayout(dtype, shape, torch.uint8)
    return TensorLayout(dtype, shape, _stored_dtype(packed, dtype, math.prod(shape)))


def is_file(packed: PackedTensor) -> bool:
    """Whether a tensor is nothing but bytes, as a file travels; takes no memory.

    Raises: as `layout`.
    """
    found = layout(packed)
    return found.dtype == found.stored == torch.uint8 and len(found.shape) == 1


def unpack(packed: PackedTensor, found: TensorLayout | None = None) -> torch.Tensor:
    """The tensor, as an own writable CPU tensor.

    A large one that has been received and is not compressed is made of the very bytes that came.

    Args:
        found: its `layout`, if somebody has asked for it.

    Raises: as `layout`.
    """
    found, buffer = found or layout(packed), packed.buffer
    if not buffer:
        return torch.empty(found.shape, dtype=found.dtype)
    if found.stored is torch.int8:
        return _from_int8(buffer, found.shape, found.dtype)
    if packed.compression in codecs.CODECS:
        return codecs.unpack(packed.compression, buffer, found.shape, found.dtype)
    tensor = torch.frombuffer(_own(buffer), dtype=found.stored).reshape(found.shape)
    return tensor if found.stored == found.dtype else tensor.to(found.dtype)


def _own(buffer: Buffer) -> bytearray | memoryview:
    """Memory to make a tensor of: what was received, else a copy."""
    if isinstance(buffer, memoryview) and not buffer.readonly:
        return buffer
    return bytearray(buffer)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # A finite sum says so in one pass; an infinite one may also have overflowed.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _stored_dtype(packed: PackedTensor, dtype: torch.dtype, elements: int) -> torch.dtype:
    """The dtype of the bytes in the buffer, checked against their number."""
    size = len(packed.buffer)
    if packed.compression == FLOAT16:
        candidates = [torch.float16]
    elif packed.compression == NONE:
        candidates = [dtype, torch.float32] if dtype == torch.bfloat16 else [dtype]
    else:
        raise BadRequest(
            f"compression {packed.compression} is not read here, send NONE ({NONE}), "
            f"FLOAT16 ({FLOAT16}) or 8-bit values ({INT8})"
        )
    for candidate in candidates:
        if elements * candidate.itemsize == size:
            return candidate
    raise BadRequest(
        f"a {packed.dtype} tensor of shape {list(packed.size)} needs "
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


def _from_int8(buffer: Buffer, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    elements, width = math.prod(shape), shape[-1]
    own = _own(buffer)
    values = torch.frombuffer(own, dtype=torch.int8, count=elements).reshape(-1, width)
    # A copy: the scales may begin at an odd byte.
    behind = bytearray(own[elements:])
    scales = torch.frombuffer(behind, dtype=torch.bfloat16).reshape(len(values), -1, 1)
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


def split(packed: PackedTensor, part_bytes: int) -> list[PackedTensor]:
    """A tensor cut into parts of at most ``part_bytes``, as hivemind streams large tensors.

    The first part carries dtype, shape and the number of parts, the others only bytes.
    """
    whole = memoryview(packed.buffer)
    count = max(1, math.ceil(len(whole) / part_bytes))
    if count == 1:
        return [replace(packed, chunks=1)]
    first = replace(packed, buffer=whole[:part_bytes], chunks=count)
    return [
        first,
        *(
            PackedTensor(whole[offset : offset + part_bytes])
            for offset in range(part_bytes, len(whole), part_bytes)
        ),
    ]


def join(parts: list[PackedTensor]) -> list[PackedTensor]:
    """The tensors of a sequence of `split` parts; a part with a dtype begins a new tensor."""
    tensors: list[PackedTensor] = []
    buffers_of: list[list[Buffer]] = []
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
            views = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
            tensor.buffer = np.concatenate(views).data
    return tensors
