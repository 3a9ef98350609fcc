"""Weights in few bits on a GPU: products and blocks against the unpacked values."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_sessions import prepared
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.packed import Grid, PackedWeight, pack, replace
from swarm_notebook.server.engine.products import few_bits, on_card
from swarm_notebook.server.engine.quantising.loading import load_quantised
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.engine.steps.decode import Decoding
from swarm_notebook.server.engine.steps.session_state import SessionState

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GRIDS = [Grid(2, 64), Grid(3, 64), *(Grid(4, group) for group in (16, 32, 64, 128)), Grid(8, 0)]
HIDDEN = 512


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_products_are_those_of_the_unpacked_weight(grid: Grid) -> None:
    for rows in (1024, 1000):
        linear = nn.Linear(2048, rows, dtype=torch.bfloat16, device="cuda")
        replace(linear, "weight", pack(torch.randn(rows, 2048).cuda(), grid), torch.bfloat16)
        few_bits.install([linear])
        packed = linear.weight.packed  # type: ignore[attr-defined]
        assert on_card.unpacks(packed, torch.bfloat16)
        assert on_card.unpacks(packed, torch.float32)
        whole = packed.unpack(torch.bfloat16).float()
        for tokens in (1, 7, 16, 21, 40, 300):
            x = torch.randn(1, tokens, 2048, device="cuda").bfloat16()
            expected = x.float() @ whole.t()
            # All of them: which is the fastest one, and whether unpacking is, changes by itself.
            ways = on_card.ways(packed, tokens) if tokens < 300 else []
            for way in (None, *ways):
                found, again = (product(linear, x, way) for _ in range(2))
                assert torch.equal(found, again)
                assert (found.float() - expected).abs().max() <= 1e-2 * expected.abs().max()


@torch.inference_mode()
def product(linear: nn.Linear, x: torch.Tensor, way: Any) -> torch.Tensor:
    """Without the bias; None: as the module computes it."""
    from swarm_notebook.server.engine.products.packed_kernel import multiply

    if way is None:
        return linear(x) - linear.bias
    return multiply(x[0], linear.weight.packed, way)[None]  # type: ignore[attr-defined]


def test_steps_through_graphs_and_compiled_blocks(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=256,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    spans = []
    for _ in range(2):
        loaded, told = load_quantised(resolve(tmp_path), 0, 3, bits=4.5, **options)  # type: ignore[arg-type]
        assert told.bits <= 4.5
        spans.append(Span(loaded.decoder, loaded.layers_name, 0))
    span, plain = spans
    few_bits.install(span.layers)
    for layer in plain.layers:
        for module in layer.modules():
            weight = module._parameters.get("weight")
            if isinstance(weight, PackedWeight):
                module._parameters["weight"] = nn.Parameter(weight.unpack(), requires_grad=False)
    decoder = Decoding.try_out(span, HIDDEN, 4096, capture=True)
    decoder.compile_beside()
    batching = Batching(possible=True, decoding=decoder)
    for rows in (1, 4):
        state = SessionState(span, context=None, cache=decoder.cache())
        alone = SessionState(plain, context=None)
        until, steps = time.monotonic() + 200, 0
        while steps < 20 or ((0, 3), rows) not in decoder.compiled:
            assert time.monotonic() < until
            assert "not compiled" not in decoder.engine
            step = Step((0, 3), torch.randn(rows, 1, HIDDEN), position=steps % 100)
            (got,) = batching.run([prepared(state, step)])
            (theirs,) = Batching().run([prepared(alone, step)])
            found, expected = got[0].float(), theirs[0].float().cpu()  # type: ignore[index]
            assert (found - expected).norm() <= 2e-2 * expected.norm()
            steps += 1
            time.sleep(0.01)
    assert decoder.engine == "compiled"
