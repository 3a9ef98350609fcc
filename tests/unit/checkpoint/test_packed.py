"""Weights in few bits: what they take and unpack to, and that torch finds what it expects."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from swarm_notebook.checkpoint.packed import Grid, PackedWeight, matrices, pack, replace, storages

GRIDS = [Grid(2, 64), Grid(3, 64), Grid(4, 128), Grid(4, 64), Grid(4, 32), Grid(8, 0)]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(96, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packing_takes_what_its_grid_costs(grid: Grid, weight: torch.Tensor) -> None:
    packed = pack(weight, grid)
    assert packed.nbytes * 8 == pytest.approx(weight.numel() * grid.cost(weight.shape))
    unpacked = packed.unpack(torch.float32)
    # Half a step of the widest group, and what bfloat16 does to scale and offset.
    step = (weight.max() - weight.min()) / (2**grid.bits - 1)
    assert (unpacked - weight).square().mean() <= step**2 / 8
    assert torch.equal(pack(unpacked, grid).unpack(torch.float32), unpacked)


def test_finer_grids_are_nearer(weight: torch.Tensor) -> None:
    errors = [(pack(weight, grid).unpack(torch.float32) - weight).square().sum() for grid in GRIDS]
    assert sorted(errors, reverse=True) == errors


def test_what_is_important_is_rounded_better(weight: torch.Tensor) -> None:
    importance = torch.ones(128)
    importance[:8] = 1000
    found = [
        (pack(weight, Grid(3, 64), given).unpack(torch.float32) - weight)[:, :8].square().sum()
        for given in (None, importance)
    ]
    assert found[1] < found[0]


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-30])
def test_groups_without_a_range_stay_as_they_are(value: float) -> None:
    for grid in GRIDS:
        unpacked = pack(torch.full((8, 128), value), grid).unpack(torch.float32)
        assert torch.allclose(unpacked, torch.full((8, 128), value), rtol=0.01, atol=1e-9)


def test_torch_finds_a_weight(weight: torch.Tensor) -> None:
    linear = nn.Linear(128, 96)
    packed = pack(weight, Grid(4, 64))
    replace(linear, "weight", packed, torch.float32)
    whole = packed.unpack(torch.float32)
    assert isinstance(linear.weight, nn.Parameter)
    assert isinstance(linear.weight, PackedWeight)
    assert not linear.weight.requires_grad
    assert (linear.weight.shape, linear.weight.dtype) == ((96, 128), torch.float32)
    assert torch.equal(linear.weight[3], whole[3])
    assert torch.equal(linear.weight + 1, whole + 1)
    x = torch.randn(2, 128, requires_grad=True)
    linear(x).sum().backward()
    assert torch.equal(linear(x), nn.functional.linear(x, whole, linear.bias))
    assert torch.allclose(x.grad, whole.sum(0).expand(2, 128), atol=1e-5)  # type: ignore[arg-type]
    assert sum(storage.nbytes() for storage in storages(linear.weight)) == packed.nbytes
    shared = copy.deepcopy(linear, {id(linear.weight): linear.weight})
    assert shared.weight is linear.weight
    assert str(packed.nbytes) in repr(linear.weight)


def test_matrices_are_what_tokens_are_multiplied_by() -> None:
    layer = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    assert [name for name, *_ in matrices(layer)] == ["0.weight", "2.weight"]
    assert not list(matrices(nn.Linear(12, 8)))  # no whole bytes
