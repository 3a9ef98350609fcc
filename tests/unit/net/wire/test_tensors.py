"""Hidden states in eight bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.memory import peak_of

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import tensors
from swarm_notebook.net.wire.message import PackedTensor
from swarm_notebook.net.wire.tensors import INT8, pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_in_eight_bits(dtype: torch.dtype) -> None:
    # Four groups, the last of them not full; one large channel spoils its own group only.
    values = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    values[..., 3] *= 1000
    values[0, 0], values[1, 2] = 0.0, values[1, 2] * 1e6
    got = unpack(pack(values.to(dtype), INT8))
    assert got.dtype == dtype
    error = (got.float() - values)[..., 16:].abs()
    bound = values[..., 16:].abs().amax(-1, keepdim=True) / 127
    assert bool((error <= (0.51 if dtype == torch.float32 else 1.5) * bound).all())
    assert not got[0, 0].any()
    if dtype == torch.float32:
        # A second time changes nothing: what is replayed after a failover is what was sent.
        torch.testing.assert_close(unpack(pack(got, INT8)), got, rtol=1e-6, atol=0)


def test_nan_stays_visible_and_nothing_is_nothing() -> None:
    values = torch.ones(1, 2, 4)
    values[0, 1, 2] = torch.nan
    assert not tensors.all_finite(unpack(pack(values, INT8)))
    assert unpack(pack(torch.empty(1, 0, 4), INT8)).shape == (1, 0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buffer": b"12345"}, "8-bit values of shape"),
        ({"size": (1 << 20, 1 << 20)}, "8-bit values of shape"),
        ({"dtype": "int64"}, "cannot be 8-bit values"),
        ({"size": ()}, "cannot be 8-bit values"),
    ],
)
def test_values_that_are_none(change: dict[str, Any], message: str) -> None:
    packed = pack(torch.randn(1, 2, 4), INT8)
    for name, value in change.items():
        setattr(packed, name, value)
    with pytest.raises(BadRequest, match=message):
        unpack(packed)


@pytest.mark.parametrize("compression", [tensors.NONE, tensors.FLOAT16, INT8])
def test_a_shape_that_no_tensor_has(compression: int) -> None:
    shape = (*[2**31 - 1] * 3, 0)
    packed = PackedTensor(size=shape, dtype="float32", compression=compression)
    with pytest.raises(BadRequest, match="no tensor that is read here has the shape"):
        unpack(packed)


def test_unpacking_narrow_rows_takes_no_more_than_the_values() -> None:
    """A group that is not full takes a whole one while it is multiplied out: 16 times as much."""
    values = torch.ones(4 << 20, 1)
    packed = pack(values, INT8)
    peak = peak_of(lambda: unpack(packed))
    assert peak < 6 * values.nbytes
