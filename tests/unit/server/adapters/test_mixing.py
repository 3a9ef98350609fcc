"""Sessions with different adapters in one call against sessions that run alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench import LocalModel
from support.peft_adapters import Tuned
from support.random_sessions import RandomSession, prepared
from support.tiny import tiny_model
from transformers.models.llama.modeling_llama import LlamaMLP

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.server.adapters.injection import AdaptedSpan
from swarm_notebook.server.engine.products import kernels
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.engine.steps.session_state import SessionState

HIDDEN, ROUNDS = 48, 14
ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {"r": 4, "lora_alpha": 16}),
    ("LoraConfig", {"r": 2, "use_dora": True}),
    ("IA3Config", {}),
    ("LoHaConfig", {"r": 3}),
    ("LoKrConfig", {"r": 3, "decompose_both": True}),
]
# Which of them, for families apart. PEFT has no LoHa and LoKr for GPT-2's Conv1D.
FAMILIES = {"llama": ADAPTERS, "gpt2": ADAPTERS[:3], "gemma3_text": ADAPTERS[:2]}


def loaded(family: str, folder: Path) -> tuple[LocalModel, Span]:
    model = LocalModel(tiny_model(family, folder), 1, 4)
    blocks = load_blocks(resolve(model.folder), 1, 4, dtype=torch.float32)
    return model, Span(blocks.decoder, blocks.layers_name, 1)


def adapted(base: Span, model: LocalModel, kind: str, **options: Any) -> AdaptedSpan:
    upload = Tuned(model, kind, seed=len(options), **options).as_upload()
    span = AdaptedSpan(base, upload, Batching.try_out(base, HIDDEN).token_wise)
    span.load(upload)
    return span


@contextmanager
def counted(span: Span) -> Iterator[list[int]]:
    """How often the decoder's own first block is called."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = span.layers[0].register_forward_hook(count)
    yield calls
    handle.remove()


def compare(base: Span, spans: list[Span]) -> int:
    """Walks with the adapters of ``spans``, together and alone; how often the decoder was called.

    That is at most once for each group of them.
    """
    alone = {
        RandomSession(span, HIDDEN, number, longest=3): span for number, span in enumerate(spans)
    }
    sessions = {
        session: SessionState(base, context=None, choose=lambda _, span=span: span)
        for session, span in alone.items()
    }
    dice, called, batching = random.Random(0), 0, Batching.try_out(base, HIDDEN)
    for _ in range(ROUNDS):
        groups: dict[Any, list[tuple[RandomSession, Any]]] = {}
        for session in dice.sample(list(alone), dice.randint(2, len(alone))):
            turn = prepared(sessions[session], session.step())
            groups.setdefault(batching.group(turn.step, turn.position), []).append((session, turn))
        expected = [
            [session.run(turn.step) for session, turn in group] for group in groups.values()
        ]
        with counted(base) as calls:
            got = [Batching().run([turn for _, turn in group]) for group in groups.values()]
        assert calls[0] <= len(groups)
        called += calls[0]
        for ours, theirs in zip(got, expected, strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                if isinstance(mine, Exception):
                    raise mine
                for one, two in zip(mine, other, strict=True):
                    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)
    return called


@pytest.mark.parametrize("family", FAMILIES)
def test_each_gets_what_it_gets_alone(family: str, tmp_path: Path) -> None:
    model, base = loaded(family, tmp_path)
    spans = [adapted(base, model, kind, **options) for kind, options in FAMILIES[family]]
    # Two sessions share an adapter, two have none.
    assert {span.host for span in spans} == {base}
    everybody = [*spans, spans[0], base, base]
    compare(base, everybody)
    with counted(base) as calls:
        steps = [first_step(base, span) for span in everybody]
        Batching().run(steps)
    assert calls[0] == 1


def first_step(base: Span, span: Span) -> Any:
    session = RandomSession(span, HIDDEN, seed=0, longest=2)
    return prepared(SessionState(base, context=None, choose=lambda _: span), session.step())


@pytest.mark.parametrize("family", FAMILIES)
def test_around_modules_with_a_forward_of_their_own(family: str, tmp_path: Path) -> None:
    """What a layer of an adapter hides from its module is there again afterwards."""
    model, base = loaded(family, tmp_path)
    kernels.install(base.layers, lambda call: call())
    own = {module: vars(module).get("forward") for module in base.layers[0].modules()}
    spans = [adapted(base, model, kind, **options) for kind, options in FAMILIES[family]]
    compare(base, [*spans, spans[0], base, base])
    assert own == {module: vars(module).get("forward") for module in base.layers[0].modules()}
    assert any(own.values()) == (family != "gpt2")  # which has no linear layers


def test_one_around_a_parameter_goes_by_itself(tmp_path: Path) -> None:
    """PEFT's layer around fused experts changes their weights: there is nothing to add to."""
    model, base = loaded("qwen3_moe", tmp_path)
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    experts = adapted(base, model, "LoraConfig", r=2, target_modules=targets)
    others = [adapted(base, model, *ADAPTERS[0][:1], **ADAPTERS[0][1]), base]
    assert experts.host is experts
    compare(base, [experts, experts, *others])


class Halves(LlamaMLP):
    """A feedforward that sends each half of the tokens through by itself, as experts do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([LlamaMLP.forward(self, half) for half in x.tensor_split(2, dim=1)], dim=1)


def test_one_around_a_module_that_sees_some_tokens_goes_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, base = loaded("llama", tmp_path)
    for layer in base.layers:
        layer.mlp.__class__ = Halves
    assert Batching.try_out(base, HIDDEN).possible
    inside, beside = (
        adapted(base, model, "LoraConfig", r=2, target_modules=[name])
        for name in ("down_proj", "q_proj")
    )
    assert (inside.host, beside.host) == (inside, base)
    compare(base, [inside, inside, beside, base])
    assert not caplog.records
