"""The kernels for cards, run by Triton's interpreter on the CPU, against torch's own arithmetic.

Triton comes with torch for GPUs only. Where it is not installed this is skipped (`make kernels`
installs it into a folder of its own, and runs this). What a card makes of the kernels, `tests/gpu`
shows.
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: make kernels", allow_module_level=True)
# Read as soon as a kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"

from swarm_notebook.checkpoint.packed import Grid, PackedGrid, pack
from swarm_notebook.server.adapters import low_rank, low_rank_kernel
from swarm_notebook.server.engine.attention import kernel, paged
from swarm_notebook.server.engine.kv.cache import PAGE
from swarm_notebook.server.engine.products import on_card, packed_kernel

GRIDS = [Grid(2, 64), Grid(3, 64), *(Grid(4, group) for group in (16, 32, 64, 128)), Grid(8, 0)]
# Columns of one chunk of a program's threads, of several, and of several and a part.
WIDTHS = (256, 1152, 4096)


def rounding(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference: torch.Tensor = (found.float() - expected).abs().max() / expected.abs().max()
    return float(difference)


def packed(grid: Grid, rows: int, columns: int) -> PackedGrid:
    generator = torch.Generator().manual_seed(0)
    return on_card.arranged(pack(torch.randn(rows, columns, generator=generator), grid))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("columns", WIDTHS)
def test_one_token_in_all_ways(grid: Grid, columns: int) -> None:
    weight = packed(grid, 24, columns)
    unpacked = weight.unpack(torch.float32).t()
    for way in on_card.ways(weight, 1):
        # The interpreter's `dot` takes bfloat16 for integers.
        x = torch.randn(1, columns).to(torch.float32 if way.fill else torch.bfloat16)
        found = packed_kernel.multiply(x, weight, way)
        assert rounding(found, x.float() @ unpacked) <= 1e-2


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tokens", [7, 21])
def test_several_tokens(grid: Grid, tokens: int) -> None:
    weight = packed(grid, 72, 256)
    x = torch.randn(tokens, 256)
    way = on_card.ways(weight, tokens)[0]
    found = packed_kernel.multiply(x, weight, way)
    assert rounding(found, x @ weight.unpack(torch.float32).t()) <= 1e-4


@pytest.mark.parametrize("grid", GRIDS, ids=str)
# Not bfloat16, to which the interpreter cuts off.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_unpacking(grid: Grid, dtype: torch.dtype) -> None:
    weight = packed(grid, 40, 256)
    assert torch.equal(packed_kernel.unpack(weight, dtype), weight.unpack(dtype))


@pytest.fixture
def rows_of_pages() -> tuple[torch.Tensor, ...]:
    """Three rows of different lengths: their pages, positions, and what they see."""
    pages = torch.tensor(np.random.default_rng(0).permutation(12).reshape(3, 4))
    positions = torch.tensor([[3], [PAGE], [3 * PAGE + 5]])
    seen = torch.arange(4 * PAGE)[None] <= positions
    # As left padding.
    seen[2, :7] = False
    return pages, positions, seen


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention(
    rows_of_pages: tuple[torch.Tensor, ...], softcap: float | None, sinks: bool
) -> None:
    pages, positions, seen = rows_of_pages
    heads, shared, size = 4, 2, 32
    keys, values = torch.randn(2, shared, 12 * PAGE, size)
    query, key, value = (torch.randn(3, count, 1, size) for count in (heads, shared, shared))
    given = torch.randn(heads) if sinks else None
    page = pages.gather(1, positions // PAGE)
    places = (page * PAGE + positions % PAGE).flatten()
    kernel.file(key, value, keys, values, places)
    for row, place in enumerate(places.tolist()):
        assert torch.equal(keys[:, place], key[row, :, 0])
        assert torch.equal(values[:, place], value[row, :, 0])
    options = {"scaling": size**-0.5, "softcap": softcap, "sinks": given}
    found = kernel.attend(query, keys, values, pages, positions, seen, **options)
    lines = (pages[..., None] * PAGE + torch.arange(PAGE)).flatten(1)
    gathered = [states[:, lines].transpose(0, 1) for states in (keys, values)]
    expected = paged._arithmetic(query, *gathered, seen[:, None], **options)
    torch.testing.assert_close(found, expected[:, 0], atol=1e-5, rtol=0)


def test_adapters_of_rows() -> None:
    width, size = 96, 72
    x, known = torch.randn(3, width), torch.randn(3, size)
    adapters = {1: (8, 0.5), 2: (20, 2.0)}
    table = torch.zeros(3, low_rank.COLUMNS, dtype=torch.int64)
    expected, kept = known.clone(), []
    for row, (rank, scale) in adapters.items():
        down, up = torch.randn(rank, width), torch.randn(size, rank)
        kept += [down, up]
        line = table[row]
        line[low_rank.DOWN], line[low_rank.UP] = down.data_ptr(), up.data_ptr()
        line[low_rank.RANK] = rank
        line[low_rank.SCALE] = int(np.float32(scale).view(np.int32))
        expected[row] += scale * (up @ (down @ x[row]))
    found = low_rank_kernel.add(x, known, table, 2 * low_rank.RANKS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(found[0], known[0])
