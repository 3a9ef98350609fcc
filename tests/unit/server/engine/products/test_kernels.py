"""Linear layers with kernels of their own: the same results, only when wanted and where it pays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import FAMILIES, tiny_model
from torch import nn

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.server.engine.products import kernels
from swarm_notebook.server.engine.products.kernels import (
    LONG_TOKENS,
    WANTED_PASSES,
    packed,
    plain,
    turned,
)
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.session_state import SessionState

HIDDEN = 48
# They multiply by something else than `torch.nn.Linear`.
OTHERWISE = {"falcon", "gpt2"}

Fastest = Callable[..., None]


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Fastest:
    """As on a machine on which these kernels are the fastest, in this order."""

    def install(*fastest: Any) -> None:
        def seconds(kernel: Any, *_: Any) -> float:
            return 0.1 + fastest.index(kernel) if kernel in fastest else 9.0

        monkeypatch.setattr(kernels, "_seconds", seconds)

    return install


def at_once(call: Callable[[], None]) -> None:
    call()


def product(layer: nn.Module) -> kernels.Product:
    return vars(layer)["forward"]


@torch.inference_mode()
def wanted(layers: Any, tokens: int, passes: int = WANTED_PASSES) -> None:
    for _ in range(passes):
        for layer in layers:
            layer(torch.ones(1, tokens, layer.in_features))


@pytest.mark.parametrize("kernel", [plain, turned, packed])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_every_kernel_gives_the_same(kernel: Any, bias: bool, fastest: Fastest) -> None:
    layer = nn.Linear(24, 40, bias=bias)
    inputs = [torch.randn(*rows, count, 24) for rows in ((1,), (2,), ()) for count in (1, 3, 64)]
    expected = [layer(x) for x in inputs]
    fastest(kernel)
    kernels.install([layer], at_once)
    for tokens in (1, 2, 4, 8, 64, LONG_TOKENS):
        wanted([layer], tokens)
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    # Of one or two tokens, nothing is packed for.
    assert (product(layer).pack is not None) == (kernel is packed)


def test_packed_weights_are_what_is_multiplied_by(fastest: Fastest) -> None:
    layer = nn.Linear(24, 40)
    fastest(packed)
    kernels.install([layer], at_once)
    wanted([layer], LONG_TOKENS)
    product(layer).pack = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(40, 24), None)
    x = torch.randn(2, LONG_TOKENS, 24)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), layer.bias.expand(2, LONG_TOKENS, 40))
    # With gradients, the model's own product is what they are of.
    output = layer(x)
    torch.testing.assert_close(output, nn.functional.linear(x, layer.weight, layer.bias))
    output.sum().backward()
    assert layer.weight.grad is not None


def test_it_begins_when_it_has_been_wanted_for_a_while(
    fastest: Fastest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(kernels, "_SPREAD_BYTES", 1)
    fastest(packed)
    later: list[Callable[[], None]] = []
    layers = [nn.Linear(24, 40) for _ in range(3)]
    kernels.install(layers, later.append)
    wanted(layers, 8, WANTED_PASSES - 1)
    assert not later
    wanted(layers, 8)
    packs = []
    while later:
        # One weight at a time; work of sessions comes in between, and multiplies as before.
        assert len(later) == 1
        later.pop()()
        packs.append(sum(product(layer).pack is not None for layer in layers))
        wanted(layers, 8)
    assert packs == [2, 3]


def test_nothing_stays_packed_where_it_does_not_pay(fastest: Fastest) -> None:
    layer = nn.Linear(24, 40)
    kernels.install([layer], at_once)
    fastest(plain, turned)
    wanted([layer], LONG_TOKENS)
    assert product(layer).pack is None
    fastest(packed)
    wanted([layer], 8)
    assert product(layer).pack is not None
    # It is in use now: who does not need it must not take it away.
    fastest(plain)
    wanted([layer], 32)
    assert product(layer).pack is not None


def test_half_of_the_free_memory_stays_free(
    fastest: Fastest, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 24 * 40 * 4 * 2 - 1

    monkeypatch.setattr(kernels.psutil, "virtual_memory", Memory)
    layer = nn.Linear(24, 40)
    fastest(packed)
    kernels.install([layer], at_once)
    wanted([layer], LONG_TOKENS)
    assert product(layer).pack is None


def test_a_clone_around_the_same_weight_shares_the_product(fastest: Fastest) -> None:
    layer = nn.Linear(24, 40)
    kernels.install([layer], at_once)
    clone = copy.deepcopy(layer, {id(layer.weight): layer.weight, id(layer.bias): layer.bias})
    assert product(clone) is product(layer)


def test_what_inherits_from_a_linear_layer_is_left_alone() -> None:
    class Halved(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    layer = nn.Sequential(Halved(24, 40), nn.Linear(40, 24))
    kernels.install([layer], at_once)
    assert "forward" not in vars(layer[0])
    assert "forward" in vars(layer[1])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sessions_get_what_they_would_get(family: str, tmp_path: Path, fastest: Fastest) -> None:
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
    fastest(packed)
    kernels.install(span.layers, at_once)
    for _ in range(2 * WANTED_PASSES):
        prefill()
    own = [vars(module).get("forward") for layer in span.layers for module in layer.modules()]
    assert any(each is not None and each.pack is not None for each in own) == (
        family not in OTHERWISE
    )
    for ours, theirs in zip(prefill(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
