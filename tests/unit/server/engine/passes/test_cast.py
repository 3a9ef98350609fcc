"""Passes in another dtype than the server's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import tiny_model

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.packed import Grid, matrices, pack, replace
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.server.adapters.store import AdapterLimits
from swarm_notebook.server.engine.engine import Engine
from swarm_notebook.server.engine.passes import cast
from swarm_notebook.server.engine.products import few_bits, kernels
from swarm_notebook.server.engine.requests import Backward, Forward
from swarm_notebook.server.engine.scheduling.pieces import run_whole
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching


def span_of(folder: Path, dtype: torch.dtype) -> Span:
    blocks = load_blocks(resolve(folder), 1, 4, dtype=dtype)
    return Span(blocks.decoder, blocks.layers_name, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "bloom"])
@pytest.mark.parametrize("room", [1, 1 << 30])
def test_blocks_compute_in_the_dtype_that_is_asked_for(
    family: str, room: int, tmp_path: Path
) -> None:
    folder = tiny_model(family, tmp_path)
    exact, half = span_of(folder, torch.float32), span_of(folder, torch.bfloat16)
    kernels.install(exact.layers, lambda call: call())
    torch.manual_seed(0)
    request = Forward((1, 4), torch.randn(2, 9, exact.config.hidden_size), states=(2,))
    request.attention_mask = torch.ones(2, 9, dtype=torch.int64)
    request.attention_mask[0, :3] = 0
    request.prompts = torch.randn(3, 1, 2, exact.config.hidden_size)
    expected = run_whole(Engine(half, 0, AdapterLimits(), Batching()).forward("me", request))
    request.dtype = torch.bfloat16
    found = run_whole(Engine(exact, 0, AdapterLimits(), Batching()).forward("me", request), room)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        # Of a token as a whole: a single value near zero says nothing in bfloat16.
        difference = (mine[:, 3:].float() - theirs[:, 3:].float()).norm(dim=-1)
        assert bool((difference < 0.02 * theirs[:, 3:].float().norm(dim=-1)).all())
    assert {weight.dtype for layer in exact.layers for weight in layer.parameters()} == {
        torch.float32
    }


def test_float32_of_half_weights_is_exact(tiny_llama: Path) -> None:
    half = span_of(tiny_llama, torch.bfloat16)
    rounded = span_of(tiny_llama, torch.float32)
    for layer in rounded.layers:
        for parameter in layer.parameters():
            parameter.data = parameter.data.bfloat16().float()
    request = Forward((1, 4), torch.randn(1, 9, half.config.hidden_size), dtype=torch.float32)
    engine = Engine(half, 0, AdapterLimits(), Batching())
    found = run_whole(engine.forward("me", request), room=30)
    torch.testing.assert_close(found[0], rounded.run(1, 4, request.hidden)[0], atol=1e-5, rtol=1e-5)


def test_packed_weights_are_what_their_bits_say(tmp_path: Path) -> None:
    """Not what they are in the dtype that the server computes in."""
    folder = tiny_model("llama", tmp_path)
    packed, whole = span_of(folder, torch.bfloat16), span_of(folder, torch.float32)
    for layer, theirs in zip(packed.layers, whole.layers, strict=True):
        for name, module, attribute, weight in list(matrices(layer)):
            made = pack(weight.detach(), Grid(8, 0))
            theirs.get_parameter(name).data.copy_(made.unpack(torch.float32))
            replace(module, attribute, made, torch.bfloat16)
        for name, parameter in theirs.named_parameters():
            if parameter.ndim == 1:
                parameter.data.copy_(layer.get_parameter(name))
    few_bits.install(packed.layers)
    hidden = torch.randn(2, 9, whole.config.hidden_size)
    found = run_whole(cast.forward(packed, Forward((1, 4), hidden), torch.float32))[0]
    torch.testing.assert_close(found, whole.run(1, 4, hidden)[0], atol=1e-5, rtol=1e-5)
    back = Backward((1, 4), hidden, grad=torch.randn_like(hidden))
    gradients, expected = (
        run_whole(cast.gradients(span, back, torch.float32)).tensors[0] for span in (packed, whole)
    )
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)
