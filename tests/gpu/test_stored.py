"""Weights as files store them, on a GPU: unpacked there as on a CPU, in graphs and compiled."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from support.random_sessions import prepared
from support.stored import SCALES, stored
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.packed import replace
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.server.engine.products import few_bits
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.engine.steps.decode import Decoding
from swarm_notebook.server.engine.steps.session_state import SessionState

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HIDDEN = 512
KINDS = [*SCALES, "words 4", "words 4 in any order", "words 8"]


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_unpacked_as_on_a_cpu(kind: str) -> None:
    packed = stored(kind, 96, HIDDEN, 0, "cuda")
    on_cpu = packed.around([part.cpu() for part in packed.parts()])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(packed.unpack(dtype).cpu(), on_cpu.unpack(dtype))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = packed.unpack(torch.float32)
    graph.replay()
    assert torch.equal(found.cpu(), on_cpu.unpack(torch.float32))


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "words 4 in any order"])
def test_steps_through_graphs_and_compiled_blocks(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=128,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    spans = []
    for _ in range(2):
        loaded = load_blocks(resolve(tmp_path), 0, 2, **options)  # type: ignore[arg-type]
        spans.append(Span(loaded.decoder, loaded.layers_name, 0))
    span, plain = spans
    for seed, (ours, theirs) in enumerate(
        zip(linear_layers(span), linear_layers(plain), strict=True)
    ):
        packed = stored(kind, *ours.weight.shape, seed, "cuda")
        replace(ours, "weight", packed, torch.bfloat16)
        theirs.weight.data = packed.unpack(torch.bfloat16)
    few_bits.install(span.layers)
    decoder = Decoding.try_out(span, HIDDEN, 4096, capture=True)
    assert decoder.engine == "graph"
    decoder.compile_beside()
    batching = Batching(possible=True, decoding=decoder)
    state = SessionState(span, context=None, cache=decoder.cache())
    alone = SessionState(plain, context=None)
    until, steps = time.monotonic() + 200, 0
    while steps < 20 or ((0, 2), 1) not in decoder.compiled:
        assert time.monotonic() < until
        assert "not compiled" not in decoder.engine
        step = Step((0, 2), torch.randn(1, 1, HIDDEN), position=steps % 100)
        (got,) = batching.run([prepared(state, step)])
        (expected,) = Batching().run([prepared(alone, step)])
        found, wanted = got[0].float(), expected[0].float().cpu()  # type: ignore[index]
        assert (found - wanted).norm() <= 2e-2 * wanted.norm()
        steps += 1
        time.sleep(0.01)
    assert decoder.engine == "compiled"


def linear_layers(span: Span) -> list[nn.Linear]:
    return [
        module
        for layer in span.layers
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    ]
