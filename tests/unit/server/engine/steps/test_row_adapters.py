"""Rows with adapters in buckets, beside rows without, against sessions alone."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any
from weakref import ref

import peft
import pytest
import torch
from support.bench import LocalModel
from support.peft_adapters import TARGETS, Tuned
from support.random_sessions import RandomSession, prepared
from support.tiny import tiny_model

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import BadRequest
from swarm_notebook.server.adapters.file import parse_safetensors
from swarm_notebook.server.adapters.injection import AdaptedSpan
from swarm_notebook.server.adapters.layers import parse_description
from swarm_notebook.server.adapters.upload import Upload, recipe_of
from swarm_notebook.server.engine.kv.cache import PAGE
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.engine.steps.decode import Decoding
from swarm_notebook.server.engine.steps.session_state import SessionState

HIDDEN, TOLERANCE, TOKENS, STEPS = 48, 1e-4, 4096, 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = (1, 4)


class Server:
    """Blocks whose steps run in buckets, and adapters on them."""

    def __init__(self, family: str, folder: Path, **options: Any):
        self.model = LocalModel(tiny_model(family, folder), *BLOCKS)
        loaded = load_blocks(
            resolve(self.model.folder), *BLOCKS, dtype=torch.float32, device=DEVICE
        )
        self.base = Span(loaded.decoder, loaded.layers_name, BLOCKS[0])
        self.decoder = Decoding.try_out(
            self.base, HIDDEN, TOKENS, capture=DEVICE == "cuda", shortest=PAGE, **options
        )
        self.token_wise = Batching.try_out(self.base, HIDDEN).token_wise
        self.batching = Batching(possible=True, decoding=self.decoder)

    def adapted(self, seed: int, kind: str = "LoraConfig", **options: Any) -> AdaptedSpan:
        upload = Tuned(self.model, kind, seed=seed, **options).as_upload()
        span = AdaptedSpan(self.base, upload, self.token_wise)
        span.load(upload)
        return span

    def session(self, span: Span) -> SessionState:
        cache = self.decoder.cache()
        return SessionState(self.base, context=None, choose=lambda _: span, cache=cache)


def close(ours: list[torch.Tensor] | Exception, theirs: list[torch.Tensor]) -> None:
    assert not isinstance(ours, Exception), ours
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
def test_sessions_of_all_kinds_together(family: str, tmp_path: Path) -> None:
    """Ranks, scales and modules of their own, two with one adapter, one with none, one that a
    table cannot tell; rollbacks, rows, padding and states as ever.
    """
    server = Server(family, tmp_path)
    lora = server.adapted(1, r=4, lora_alpha=16)
    other = server.adapted(2, r=19, target_modules=TARGETS[family][:1])
    dora = server.adapted(3, r=2, use_dora=True)
    assert lora.additions is not None
    assert dora.additions is None
    alone = [
        RandomSession(span, HIDDEN, seed, longest=6)
        for seed, span in enumerate([lora, other, server.base, dora, lora])
    ]
    sessions = [server.session(session.span) for session in alone]
    taken = dict.fromkeys(range(len(alone)), 0)
    for _ in range(STEPS):
        calls: dict[tuple[int, int], list[tuple[int, Any]]] = {}
        for index, session in enumerate(alone):
            item = prepared(sessions[index], session.step())
            calls.setdefault(item.step.blocks, []).append((index, item))
        for members in calls.values():
            for index, item in members:
                taken[index] += server.decoder.takes(item)
            expected = [alone[index].run(item.step) for index, item in members]
            outcomes = server.batching.run([item for _, item in members])
            for ours, theirs in zip(outcomes, expected, strict=True):
                close(ours, theirs)
    assert not taken.pop(3)
    assert min(taken.values()) > STEPS // 3
    assert "adapters" not in server.decoder.engine


def test_new_values_count_from_the_next_step_on(tmp_path: Path) -> None:
    server = Server("llama", tmp_path)
    span = server.adapted(1, r=4)
    ours, theirs = server.session(span), SessionState(span, context=None)
    for seed in (1, 2, 2, 3):
        span.load(Tuned(server.model, "LoraConfig", seed=seed, r=4).as_upload())
        step = Step(BLOCKS, torch.randn(2, 1, HIDDEN))
        item = prepared(ours, step)
        assert server.decoder.takes(item)
        (got,) = server.batching.run([item])
        (expected,) = Batching().run([prepared(theirs, step)])
        assert not isinstance(expected, Exception)
        close(got, expected)


def test_an_adapter_that_is_dropped_is_gone(tmp_path: Path) -> None:
    """Its memory was counted: buckets must not keep it."""
    server = Server("llama", tmp_path)
    span = server.adapted(1, r=4)
    held = ref(span.additions)
    state = server.session(span)
    item = prepared(state, Step(BLOCKS, torch.randn(1, 1, HIDDEN)))
    assert server.decoder.takes(item)
    server.batching.run([item])
    del span, state, item
    gc.collect()
    assert held() is None


def test_a_layer_that_says_more_than_its_matrices_is_not_told_in_a_table(tmp_path: Path) -> None:
    server = Server("llama", tmp_path)
    for options in ({"lora_bias": True}, {"r": 300}):
        span = server.adapted(1, **options)
        assert span.additions is None
        assert span.host is server.base


def test_what_a_layer_says_of_itself_is_tried_first(tmp_path: Path) -> None:
    """A scale that is no number, or none, is a bad request; one that may change is left to PEFT."""
    server = Server("llama", tmp_path)
    tuned = Tuned(server.model, "LoraConfig", seed=1, r=4)
    file, text = tuned.adapter.packed(*BLOCKS)
    tensors = parse_safetensors(torch.frombuffer(bytearray(file), dtype=torch.uint8))
    tensors["scale"] = torch.tensor([2.0])

    def span(scaling: Any) -> AdaptedSpan:
        told = json.loads(text)
        for block in told["blocks"].values():
            for layer in block["layers"].values():
                layer["attributes"]["scaling"] = scaling
            block["tensors"]["scale"] = "scale"
        changed = json.dumps(told).encode()
        layers = parse_description(changed, BLOCKS, tensors, peft.__version__)
        recipe = recipe_of(BLOCKS, changed, tensors)
        return AdaptedSpan(
            server.base, Upload("mine", 1, recipe, layers, tensors), server.token_wise
        )

    assert span({"dict": [["default", 2.0]]}).additions is not None
    assert span({"dict": [["default", {"tensor": "scale"}]]}).additions is None
    for wrong in (
        "two",
        {"dict": []},
        {"dict": [["default", "two"]]},
        {"dict": [["default", None]]},
    ):
        with pytest.raises(BadRequest, match="does not run in these blocks"):
            span(wrong)


def test_adapters_that_fail_cost_nobody_else_his_graphs(tmp_path: Path) -> None:
    server = Server("llama", tmp_path)
    span = server.adapted(1, r=4)
    state, alone = server.session(span), SessionState(span, context=None)
    plain, other = server.session(server.base), SessionState(server.base, context=None)
    for index in range(4):
        if index == 2:
            # As if the card had failed: what these buckets read is gone.
            for program in server.decoder._programs.values():
                if program._adapters is not None:
                    program._adapters._table = program._adapters._rows = None  # type: ignore[assignment]
        step = Step(BLOCKS, torch.randn(1, 1, HIDDEN))
        for ours, theirs in ((state, alone), (plain, other)):
            (got,) = server.batching.run([prepared(ours, step)])
            (expected,) = Batching().run([prepared(theirs, step)])
            assert not isinstance(expected, Exception)
            close(got, expected)
    assert "adapters plain: TypeError" in server.decoder.engine
    assert not server.decoder.takes(prepared(state, Step(BLOCKS, torch.randn(1, 1, HIDDEN))))
    assert server.decoder.takes(prepared(plain, Step(BLOCKS, torch.randn(1, 1, HIDDEN))))


def test_with_a_fixed_number_of_rows_company_changes_no_bit(tmp_path: Path) -> None:
    """Neither that of other adapters for who has none, nor that of larger ranks."""
    server = Server("llama", tmp_path, rows=8)
    server.batching = Batching(possible=True, decoding=server.decoder, alone=True)
    spans = [server.base, server.adapted(1, r=4), server.adapted(2, r=40)]
    steps = [torch.randn(1, 1, HIDDEN) for _ in spans]

    def run(some: list[int]) -> list[torch.Tensor]:
        items = [
            prepared(server.session(spans[index]), Step(BLOCKS, steps[index])) for index in some
        ]
        return [outcome[0] for outcome in server.batching.run(items)]  # type: ignore[index]

    alone = [run([index])[0] for index in range(len(spans))]
    for some in ([0, 1, 2], [2, 1, 1, 0], [0, 0, 2]):
        for index, output in zip(some, run(some), strict=True):
            assert torch.equal(output, alone[index])
