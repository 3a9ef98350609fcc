"""hivemind's lossy compressions, against hivemind's own code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import codecs, tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor

KINDS = sorted(codecs.CODECS)
# hivemind writes the other one with bitsandbytes alone (`tests/foreign/test_quantisers.py`).
WRITTEN_BY_HIVEMIND = [kind for kind in KINDS if kind != codecs.BLOCKWISE_8BIT]
# How far values may be off, relative to their deviation.
CLOSE = {codecs.MEANSTD_16BIT: 2e-3, codecs.QUANTILE_8BIT: 0.2, codecs.UNIFORM_8BIT: 0.2}


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.mark.parametrize("kind", WRITTEN_BY_HIVEMIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_hivemind_wrote_is_read(kind: int, dtype: torch.dtype) -> None:
    whole = values(2, 5, 48).to(dtype)
    got = tensors.unpack(PackedTensor.of(serialize_torch_tensor(whole, kind)))
    assert (got.dtype, got.shape) == (dtype, whole.shape)
    error = (got - whole).float().norm() / whole.float().norm()
    assert float(error) < CLOSE[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_here_is_what_hivemind_reads(kind: int) -> None:
    whole = values(2, 5, 48)
    packed = tensors.pack(whole, kind)
    assert packed.compression == kind
    if kind == codecs.MEANSTD_16BIT:  # the others hivemind cannot read with today's numpy
        written = PackedMessage(tensors=[packed]).to_bytes()
        (theirs,) = runtime_pb2.ExpertRequest.FromString(written).tensors
        torch.testing.assert_close(deserialize_torch_tensor(theirs), tensors.unpack(packed))
    halves = tensors.pack(whole.bfloat16(), kind)
    assert halves.dtype == "float32"
    assert tensors.unpack(halves).shape == whole.shape
    assert tensors.pack(whole[:1, :1, :1], kind).compression == tensors.NONE
    assert tensors.unpack(tensors.pack(whole[:, :0], kind)).shape == (2, 0, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_do_not_fit_are_refused_before_memory_is_taken(kind: int) -> None:
    packed = tensors.pack(values(2, 8), kind)
    for shape in ([1 << 20, 1 << 20], [0, 8], []):
        lying = replace(packed, size=tuple(shape))
        with pytest.raises(BadRequest):
            tensors.layout(lying)
    for buffer in (b"", packed.buffer[:-1], bytes(8) + packed.buffer[8:]):
        lying = replace(packed, buffer=buffer)
        if buffer == packed.buffer or (kind == codecs.MEANSTD_16BIT and buffer[8:]):
            continue
        with pytest.raises(BadRequest):
            tensors.layout(lying)
    whole = replace(packed, dtype="int64")
    with pytest.raises(BadRequest, match="cannot be compressed"):
        tensors.layout(whole)


def test_a_codebook_that_lacks_an_entry() -> None:
    book = (3).to_bytes(8, "little") + bytes(12)
    packed = PackedTensor(
        buffer=book + bytes([0, 1, 2, 3]),
        size=(4,),
        dtype="float32",
        compression=codecs.UNIFORM_8BIT,
    )
    with pytest.raises(BadRequest, match="entry 3 of a codebook of 3"):
        tensors.unpack(packed)


def blocks(sizes: list[float], codebook: list[float], chosen: bytes, **more: int) -> bytes:
    """`BLOCKWISE_8BIT` by hand; ``more`` may tell other counts: ``blocks``, ``entries``."""
    counts = {"blocks": len(sizes), "entries": len(codebook), **more}
    head = b"".join(count.to_bytes(8, "little", signed=True) for count in counts.values())
    return head + np.array([*sizes, *codebook], np.float32).tobytes() + chosen


def blockwise(buffer: bytes, *shape: int) -> PackedTensor:
    return PackedTensor(
        buffer=buffer, size=shape, dtype="float32", compression=codecs.BLOCKWISE_8BIT
    )


def test_blocks_by_hand() -> None:
    """4,096 values of the first block, two of the second."""
    chosen = bytes([0, 2] * 2049)
    packed = blockwise(blocks([8.0, 0.5], [-1.0, 0.0, 0.25], chosen), 2, 2049)
    expected = torch.tensor([-8.0, 2.0] * 2048 + [-0.5, 0.125]).reshape(2, 2049)
    assert torch.equal(tensors.unpack(packed), expected)


@pytest.mark.parametrize(
    ("buffer", "told"),
    [
        (blocks([1.0, 1.0], [0.0, 1.0], bytes(4)), "2 blocks, 4 values have 1"),
        (blocks([1.0], [0.0], bytes(4), blocks=-1), "-1 blocks"),
        (blocks([1.0], [0.0], bytes(4), entries=1 << 40), "codebook of 1099511627776"),
        (blocks([1.0], [], bytes(4)), "codebook of 0"),
        (blocks([1.0], [0.0], bytes(5)), "need 28 bytes, the buffer has 29"),
        (bytes(3), "0 blocks"),
    ],
)
def test_blocks_that_do_not_fit(buffer: bytes, told: str) -> None:
    with pytest.raises(BadRequest, match=told):
        tensors.layout(blockwise(buffer, 4))


def test_blocks_of_very_different_sizes() -> None:
    """Each is as exact as its own largest value allows; zeros stay zeros."""
    whole = values(3, 4096) * torch.tensor([[1e-3], [0.0], [1e3]])
    got = tensors.unpack(tensors.pack(whole.reshape(1, 3, 4096), codecs.BLOCKWISE_8BIT))
    error = (got[0] - whole).norm(dim=1) / whole.norm(dim=1).clamp_min(1)
    assert not got[0, 1].any()
    assert error.max() < 0.02
