"""Long passes with another product than the model's own: the same results, only where it pays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny_model
from torch import nn

from swarm_notebook.checkpoint.partial import load_blocks
from swarm_notebook.checkpoint.source import resolve
from swarm_notebook.server import linear
from swarm_notebook.server.linear import LONG_TOKENS, MAX_TOKENS, Products
from swarm_notebook.server.quick import WANTED_PASSES, Quick
from swarm_notebook.server.requests import Step
from swarm_notebook.server.span import Span
from swarm_notebook.server.state import SessionState

HIDDEN = 48
# They multiply by something else than `torch.nn.functional.linear`.
OTHERWISE = {"falcon", "gpt2"}


def packing(layers: Any, later: Any = lambda call: call()) -> tuple[Products, Quick]:
    """As on a machine on which packed weights are the fastest for everything that is long."""
    products = Products.of(layers)
    products._ways = {(shape, LONG_TOKENS): linear.packed for shape in products._weights}
    return products, Quick(products, later)


def passes(quick: Quick, layers: Sequence[nn.Module], count: int = WANTED_PASSES) -> None:
    for _ in range(count):
        with quick.during(LONG_TOKENS):
            for layer in layers:
                layer(torch.ones(1, 24))


@torch.inference_mode()
def test_only_long_passes_and_known_weights() -> None:
    layer, other = nn.Linear(24, 40), nn.Linear(24, 40)
    products, quick = packing([layer])
    x = torch.randn(2, MAX_TOKENS, 24)
    expected = layer(x), other(x)
    passes(quick, [layer, other])
    assert not quick._looking.weights  # an adapter's would live on in there
    with quick.during(2 * MAX_TOKENS):
        torch.testing.assert_close(layer(x), expected[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(other(x), expected[1])
        # Another pack, to see that it is what is used.
        nothing = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(40, 24), None)
        products._packs[layer.weight.data_ptr()] = nothing
        torch.testing.assert_close(layer(x), layer.bias.expand(2, MAX_TOKENS, 40))
    with quick.during(MAX_TOKENS):
        assert torch.equal(layer(x), expected[0])


def test_it_begins_when_it_has_been_wanted_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm_notebook.server.quick._CHUNK_BYTES", 1)
    layers, later = [nn.Linear(24, 40) for _ in range(3)], []
    products, quick = packing(layers, later.append)
    passes(quick, layers, WANTED_PASSES - 1)
    assert not later
    passes(quick, layers)
    for packed in range(3):
        # One weight at a time; work of sessions comes in between.
        assert len(products._packs) == packed
        assert quick._swapping is None
        later.pop()()
    assert not later
    assert len(products._packs) == 3
    assert quick._swapping is not None


def test_nothing_is_packed_where_it_does_not_pay() -> None:
    layer = nn.Linear(24, 40)
    products, quick = packing([layer])
    products._ways = {(layer.weight.shape, LONG_TOKENS): linear.plain}
    passes(quick, [layer])
    assert quick._swapping is None
    assert not products._packs


def test_what_lost_a_trial_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(24, 40)
    products = Products.of([layer])
    seconds = {linear.plain: 1.0, linear.turned: 2.0, linear.packed: 3.0}
    monkeypatch.setattr(linear, "_seconds", lambda way, *_: seconds[way])
    assert products.way(layer.weight, LONG_TOKENS) is linear.plain
    assert not products._packs
    seconds[linear.packed] = 0.5
    assert products.way(layer.weight, 8) is linear.packed
    assert len(products._packs) == 1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sessions_get_what_they_would_get(family: str, tmp_path: Path) -> None:
    loaded = load_blocks(resolve(tiny_model(family, tmp_path)), 1, 4, dtype=torch.float32)
    span = Span(loaded.decoder, loaded.layers_name, 1)
    hidden = torch.randn(2, 60, HIDDEN, generator=torch.Generator().manual_seed(0))

    def prefill() -> list[torch.Tensor]:
        state = SessionState(span, context=None)
        state.cache.restart(2)
        state.cache.reserve(60)
        step = Step((1, 4), hidden, states=(1, 2))
        return [*state.run(step, 0, 0, 40), *state.compute(step, 0, 40, 60)]

    expected = prefill()
    products, span.quick = packing(span.layers)
    for _ in range(WANTED_PASSES):
        prefill()
    assert bool(products._packs) == (family not in OTHERWISE)
    for ours, theirs in zip(prefill(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
