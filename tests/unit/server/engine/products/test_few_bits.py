"""Products with weights in few bits: what unpacking gives, whatever computes them."""

from __future__ import annotations

import copy

import pytest
import torch
from support.stored import stored
from torch import nn
from torch.nn import functional

from swarm_notebook.checkpoint.packed import Grid, pack, replace
from swarm_notebook.server.engine.products import few_bits

GRIDS = [Grid(2, 64), Grid(3, 64), Grid(4, 64), Grid(4, 32), Grid(8, 0)]


def packed_linear(grid: Grid, dtype: torch.dtype) -> tuple[nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(128, 192, dtype=dtype)
    packed = pack(torch.randn(192, 128, generator=generator), grid)
    replace(linear, "weight", packed, dtype)
    few_bits.install([linear])
    return linear, packed.unpack(torch.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_products_are_those_of_the_unpacked_weight(grid: Grid, tokens: int) -> None:
    x = torch.randn(2, tokens, 128)
    for dtype, close in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        linear, whole = packed_linear(grid, dtype)
        bias = linear.bias.float()
        expected = functional.linear(x.to(dtype).float(), whole, bias)
        with torch.inference_mode():
            found = linear(x.to(dtype)).float()
        assert (found - expected).abs().max() <= close * expected.abs().max()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_an_operator_gives_what_unpacking_gives(grid: Grid) -> None:
    """Whether or not it is the faster one here."""
    linear, whole = packed_linear(grid, torch.bfloat16)
    operator = few_bits.operator_for(linear.weight.packed, torch.bfloat16)  # type: ignore[attr-defined]
    assert torch.equal(linear.weight.packed.unpack(torch.float32), whole)  # type: ignore[attr-defined]
    assert linear.weight.packed.nbytes == pack(whole, grid).nbytes  # type: ignore[attr-defined]
    if operator is not None:
        x = torch.randn(7, 128).to(torch.bfloat16)
        expected = x.float() @ whole.t()
        assert (
            operator(x, linear.weight.packed).float() - expected
        ).abs().max() <= 1e-2 * expected.abs().max()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_go_through_the_unpacked_weight(grid: Grid) -> None:
    linear, whole = packed_linear(grid, torch.float32)
    x = torch.randn(3, 128, requires_grad=True)
    expected = torch.randn(3, 192)
    linear(x).backward(expected)
    assert torch.allclose(x.grad, expected @ whole, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "words 4"])
def test_four_bits_of_a_file_are_multiplied_as_they_are(kind: str) -> None:
    weight = stored(kind, 192, 256, 0)
    linear = nn.Linear(256, 192, dtype=torch.bfloat16)
    replace(linear, "weight", weight, torch.bfloat16)
    few_bits.install([linear])
    packed = linear.weight.packed  # type: ignore[attr-defined]
    whole = weight.unpack(torch.float32)
    assert torch.equal(packed.unpack(torch.float32), whole)
    assert packed.nbytes == weight.nbytes
    if (operator := few_bits.operator_for(packed, torch.bfloat16)) is not None:
        x = torch.randn(7, 256).to(torch.bfloat16)
        expected = x.float() @ whole.t()
        error = (operator(x, packed).float() - expected).norm()
        # As near as a product with the weight in bfloat16.
        rounded = functional.linear(x, whole.to(torch.bfloat16)).float() - expected
        assert error <= 1.5 * rounded.norm()


def test_a_clone_multiplies_by_the_same_bits() -> None:
    linear, _ = packed_linear(Grid(4, 64), torch.bfloat16)
    clone = copy.deepcopy(linear, {id(p): p for p in linear.parameters()})
    x = torch.randn(1, 128).to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(clone(x), linear(x))
