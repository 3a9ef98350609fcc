"""What the engine keeps for whom, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench import LocalModel
from support.peft_adapters import Tuned

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.server.adapters.store import AdapterLimits
from swarm_notebook.server.engine.engine import Engine
from swarm_notebook.server.engine.requests import Forward
from swarm_notebook.server.engine.scheduling.pieces import run_whole
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching

HIDDEN, ROWS, LENGTH = 48, 2, 12


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LocalModel:
    return LocalModel(tiny_llama, 1, 4)


@pytest.fixture(scope="module")
def span(tiny_llama: Path) -> Span:
    blocks = load_blocks(resolve(tiny_llama), 1, 4, dtype=torch.float32)
    return Span(blocks.decoder, blocks.layers_name, 1)


def engine(span: Span, budget: int) -> Engine:
    return Engine(span, budget, AdapterLimits(), Batching())


def a_pass(adapter: bool = False, rows: int = ROWS, **options: Any) -> Forward:
    key = ("mine", 1) if adapter else None
    return Forward((1, 4), torch.randn(rows, LENGTH, HIDDEN), adapter=key, keep="it", **options)


def kept_bytes(engine: Engine, peer: str, request: Forward) -> int:
    run_whole(engine.forward(peer, request))
    return engine.facts()["activation_bytes_held"]


def test_a_pass_too_large_to_keep_is_held_against_nobody_else(
    span: Span, model: LocalModel
) -> None:
    upload = Tuned(model, "LoraConfig", r=64).as_upload()
    roomy = engine(span, 1 << 30)
    roomy.load_adapter("alice", upload)
    plain = kept_bytes(roomy, "bob", a_pass())
    assert kept_bytes(roomy, "alice", a_pass(adapter=True)) > 2 * plain + 1000
    tight = engine(span, plain + 500)
    tight.load_adapter("alice", upload)
    assert kept_bytes(tight, "alice", a_pass(adapter=True)) == 0
    assert kept_bytes(tight, "bob", a_pass()) == plain
    # Nor is one of another kind through the same blocks.
    assert kept_bytes(tight, "carol", a_pass(prompts=torch.randn(3, ROWS, 4, HIDDEN))) == 0
    assert kept_bytes(tight, "bob", a_pass()) == plain


def test_a_kind_of_pass_that_is_too_large_is_tried_once(span: Span) -> None:
    small = engine(span, kept_bytes(engine(span, 1 << 30), "bob", a_pass()))
    kept = kept_bytes(small, "bob", a_pass())
    assert kept > 0
    assert kept_bytes(small, "bob", a_pass(rows=ROWS + 1)) == 0  # in trying, all room was made
    assert kept_bytes(small, "bob", a_pass()) == kept
    assert kept_bytes(small, "bob", a_pass(rows=ROWS + 1)) == kept
    assert kept_bytes(small, "bob", a_pass(rows=ROWS + 2)) == kept
