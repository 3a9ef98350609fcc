"""hivemind's lossy compressions of tensors, for Petals' peers that ask for them.

They are written by hivemind's own code. They are read here: hivemind 1.1.12 cannot read its 8-bit
forms with numpy >= 2.4, and looks at no size. `BLOCKWISE_8BIT` needs bitsandbytes and is neither
read nor written.

- `MEANSTD_16BIT`: float16 values, of which each row of the last dimension has mean 0 and standard
  deviation 1; behind all values the rows' means, then their deviations, as float32.
- `UNIFORM_8BIT` and `QUANTILE_8BIT`: an int64 that counts the entries of a codebook, these as
  float32, and behind them one byte for each value, its entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.proto import runtime_pb2

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire.message import Buffer

MEANSTD_16BIT = runtime_pb2.CompressionType.MEANSTD_16BIT
QUANTILE_8BIT = runtime_pb2.CompressionType.QUANTILE_8BIT
UNIFORM_8BIT = runtime_pb2.CompressionType.UNIFORM_8BIT
CODECS = frozenset({MEANSTD_16BIT, QUANTILE_8BIT, UNIFORM_8BIT})

_COUNT_BYTES, _ENTRY_BYTES, _MAX_ENTRIES = 8, 4, 256


def pack(tensor: torch.Tensor, compression: int) -> runtime_pb2.Tensor | None:
    """`tensor` in one of `CODECS`; None where that makes no sense (fewer than two values)."""
    if tensor.numel() < 2:
        return None
    # Numpy, which reads the dtype on the other side, knows no bfloat16.
    values = tensor.detach().cpu()
    values = values.float() if values.dtype == torch.bfloat16 else values
    return serialize_torch_tensor(values, compression)


def check(compression: int, buffer: Buffer, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Compare the number of bytes with the shape; takes no memory.

    Raises:
        BadRequest: they do not fit, or these are no floating point values.
    """
    elements, size = math.prod(shape), len(buffer)
    if not shape or not elements or not dtype.is_floating_point:
        raise BadRequest(f"a {dtype} tensor of shape {list(shape)} cannot be compressed values")
    if compression == MEANSTD_16BIT:
        needed = 2 * elements + 2 * _ENTRY_BYTES * (elements // shape[-1])
    else:
        entries = int.from_bytes(buffer[:_COUNT_BYTES], "little", signed=True)
        if not 0 < entries <= _MAX_ENTRIES:
            raise BadRequest(f"a codebook of {entries} entries, expected 1 to {_MAX_ENTRIES}")
        needed = _COUNT_BYTES + _ENTRY_BYTES * entries + elements
    if size != needed:
        raise BadRequest(
            f"compressed values of shape {list(shape)} need {needed} bytes, the buffer has {size}"
        )


def unpack(
    compression: int, buffer: Buffer, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """The tensor in a buffer that `check` has passed.

    Raises:
        BadRequest: a value names an entry that the codebook does not have.
    """
    own, elements = bytearray(buffer), math.prod(shape)
    if compression == MEANSTD_16BIT:
        values = torch.frombuffer(own, dtype=torch.float16, count=elements)
        # A copy: the rows' numbers may begin at an odd place.
        means, deviations = torch.frombuffer(own[2 * elements :], dtype=torch.float32).chunk(2)
        rows = values.reshape(-1, shape[-1]).to(torch.float32)
        return rows.mul_(deviations[:, None]).add_(means[:, None]).reshape(*shape).to(dtype)
    entries = int.from_bytes(own[:_COUNT_BYTES], "little")
    begin = _COUNT_BYTES + _ENTRY_BYTES * entries
    codebook = torch.frombuffer(own[_COUNT_BYTES:begin], dtype=torch.float32).to(dtype)
    chosen = torch.frombuffer(own, dtype=torch.uint8, offset=begin)
    if int(chosen.max()) >= entries:
        raise BadRequest(f"a value names entry {int(chosen.max())} of a codebook of {entries}")
    return codebook.index_select(0, chosen.to(torch.int32)).reshape(*shape)
