"""hivemind's lossy compressions of tensors, for Petals' peers that ask for them.

They are written by hivemind's own code, but for `BLOCKWISE_8BIT`, for which that needs bitsandbytes
on either side. They are read here: hivemind 1.1.12 cannot read its 8-bit forms with numpy >= 2.4,
and looks at no size.

- `MEANSTD_16BIT`: float16 values, of which each row of the last dimension has mean 0 and standard
  deviation 1; behind all values the rows' means, then their deviations, as float32.
- `UNIFORM_8BIT` and `QUANTILE_8BIT`: an int64 that counts the entries of a codebook, these as
  float32, and behind them one byte for each value, its entry.
- `BLOCKWISE_8BIT`: an int64 that counts blocks of 4,096 values and one that counts the entries of a
  codebook, the largest size in each block and the entries as float32, and one byte for each value:
  an entry, by which the largest size of its block is multiplied.
"""

from __future__ import annotations

import functools
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
BLOCKWISE_8BIT = runtime_pb2.CompressionType.BLOCKWISE_8BIT
CODECS = frozenset({MEANSTD_16BIT, QUANTILE_8BIT, UNIFORM_8BIT, BLOCKWISE_8BIT})

_COUNT_BYTES, _ENTRY_BYTES, _MAX_ENTRIES = 8, 4, 256
_BLOCK = 4096  # hivemind's


def pack(tensor: torch.Tensor, compression: int) -> runtime_pb2.Tensor | None:
    """`tensor` in one of `CODECS`; None where that makes no sense (fewer than two values)."""
    if tensor.numel() < 2:
        return None
    # Numpy, which reads the dtype on the other side, knows no bfloat16.
    values = tensor.detach().cpu()
    values = values.float() if values.dtype == torch.bfloat16 else values
    if compression == BLOCKWISE_8BIT:
        return _to_blocks(values)
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
        begin = 0
        if compression == BLOCKWISE_8BIT:
            blocks, expected = _count(buffer, 0), -(-elements // _BLOCK)
            if blocks != expected:
                raise BadRequest(f"{blocks} blocks, {elements} values have {expected}")
            begin = _COUNT_BYTES + _ENTRY_BYTES * blocks
        entries = _count(buffer, _COUNT_BYTES if begin else 0)
        if not 0 < entries <= _MAX_ENTRIES:
            raise BadRequest(f"a codebook of {entries} entries, expected 1 to {_MAX_ENTRIES}")
        needed = begin + _COUNT_BYTES + _ENTRY_BYTES * entries + elements
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
    counts = _COUNT_BYTES * (2 if compression == BLOCKWISE_8BIT else 1)
    entries = _count(buffer, counts - _COUNT_BYTES)
    blocks = _count(buffer, 0) if compression == BLOCKWISE_8BIT else 0
    floats = torch.frombuffer(own, dtype=torch.float32, offset=counts, count=blocks + entries)
    chosen = torch.frombuffer(own, dtype=torch.uint8, offset=counts + floats.nbytes)
    if int(chosen.max()) >= entries:
        raise BadRequest(f"a value names entry {int(chosen.max())} of a codebook of {entries}")
    largest, codebook = floats[:blocks], floats[blocks:]
    if not blocks:
        return codebook.to(dtype).index_select(0, chosen.to(torch.int32)).reshape(*shape)
    values = codebook.index_select(0, chosen.to(torch.int32))
    for block, size in zip(values.split(_BLOCK), largest, strict=True):
        block.mul_(size)
    return values.reshape(*shape).to(dtype)


def _count(buffer: Buffer, offset: int) -> int:
    return int.from_bytes(buffer[offset : offset + _COUNT_BYTES], "little", signed=True)


def _to_blocks(values: torch.Tensor) -> runtime_pb2.Tensor:
    """`values` in `BLOCKWISE_8BIT`."""
    flat, codebook = values.flatten().float(), _dynamic_codebook()
    borders = (codebook[1:] + codebook[:-1]) / 2
    largest, chosen = [], []
    for block in flat.split(_BLOCK):
        size = block.abs().max()
        largest.append(size)
        chosen.append(torch.bucketize(block / size if size else block, borders).to(torch.uint8))
    counts = torch.tensor([len(largest), len(codebook)])
    parts = (counts, torch.stack(largest), codebook, torch.cat(chosen))
    return runtime_pb2.Tensor(
        buffer=b"".join(part.numpy().tobytes() for part in parts),
        size=values.shape,
        dtype=str(values.dtype).removeprefix("torch."),
        compression=BLOCKWISE_8BIT,
    )


@functools.cache
def _dynamic_codebook() -> torch.Tensor:
    """The 256 entries of bitsandbytes from -1 to 1, of which most are small, in their order.

    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (arXiv 1511.04561, 2015): six
    powers of ten below 1 and 1, the range of each cut in twice as many parts as that of the last.
    """
    entries = [torch.tensor([0.0, 1.0])]
    for power in range(7):
        borders = torch.linspace(0.1, 1, 2**power + 1)
        middles = 10.0 ** (power - 6) * (borders[1:] + borders[:-1]) / 2
        entries += [middles, -middles]
    return torch.cat(entries).sort().values
