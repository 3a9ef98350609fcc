"""Whether two servers' weights have the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from swarm_notebook.checkpoint.packed import Grid, PackedWeight, pack, packing_of, replace
from swarm_notebook.client.servers import bits
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.net.dht.records import ServerInfo, ServerSpan, ServerState

FOUR = bytes(range(16))


def segment(start: int, end: int, **facts: Any) -> RouteSegment:
    info = ServerInfo(state=ServerState.ONLINE, throughput=1.0, start_block=2, end_block=6, **facts)
    return RouteSegment(ServerSpan("peer", 2, 6, info), start, end)


def test_whole_weights_are_the_checkpoints() -> None:
    assert bits.packing_of(segment(3, 5, quant_type="none", torch_dtype="bfloat16")) == bytes(8)


@pytest.mark.parametrize(
    ("told", "expected"), [(FOUR, FOUR[4:12]), (None, None), (FOUR[:15], None), (FOUR * 2, None)]
)
def test_packed_ones_are_what_their_server_says(told: bytes | None, expected: bytes | None) -> None:
    facts = {"quant_type": "int4", "weight_bits": 4.5, "packing": told}
    assert bits.packing_of(segment(3, 5, **facts)) == expected
    assert bits.packing_of(segment(1, 5, **facts)) is None


def test_other_bits_are_told_apart() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))

    def packed(values: torch.Tensor, grid: Grid) -> bytes:
        layer = nn.Sequential(nn.Linear(64, 16))
        replace(layer[0], "weight", pack(values, grid), torch.bfloat16)
        assert isinstance(layer[0].weight, PackedWeight)
        return packing_of(layer)

    changed = weight.clone()
    changed[3, 5] += 1
    found = [packed(weight, Grid(4, 32)), packed(weight, Grid(4, 64)), packed(changed, Grid(4, 32))]
    assert len(set(found)) == 3
    assert packed(weight.clone(), Grid(4, 32)) == found[0]
