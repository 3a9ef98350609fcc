"""The torch threads of two servers in one process: neither sees what the other is at."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from support.bench import LocalModel
from support.peft_adapters import Tuned

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.server.adapters.injection import AdaptedSpan
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.engine.steps.session_state import BatchItem, SessionState, run_one

HIDDEN, BLOCKS, GENEROUS = 48, (1, 4), 60.0


def loaded(folder: Path) -> Span:
    blocks = load_blocks(resolve(folder), *BLOCKS, dtype=torch.float32)
    return Span(blocks.decoder, blocks.layers_name, 1)


def first_steps(span: Span, seed: int) -> list[BatchItem]:
    generator = torch.Generator().manual_seed(seed)
    return [
        BatchItem(
            SessionState(span, None),
            Step(BLOCKS, torch.randn(1, length, HIDDEN, generator=generator)),
            0,
            0,
            length,
        )
        for length in (3, 5)
    ]


def test_batches_at_the_same_time(tiny_llama: Path) -> None:
    spans, inside = [loaded(tiny_llama), loaded(tiny_llama)], threading.Barrier(2)

    def batch(number: int) -> Any:
        outcomes = Batching().run(first_steps(spans[number], number))
        return [outcome[0] if isinstance(outcome, list) else outcome for outcome in outcomes]

    def meet(*_: Any) -> None:
        inside.wait(GENEROUS)

    for span in spans:
        span.layers[1].register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(batch, range(2)))
    plain = loaded(tiny_llama)
    for number, outputs in enumerate(together):
        alone = [run_one(item)[0] for item in first_steps(plain, number)]
        for ours, expected in zip(outputs, alone, strict=True):
            assert torch.allclose(ours, expected, atol=1e-4)


def test_dropout_at_the_same_time(tiny_llama: Path) -> None:
    """Its masks come from torch's one generator."""
    model, base = LocalModel(tiny_llama, 1, 4), loaded(tiny_llama)
    upload = Tuned(model, "LoraConfig", r=4, lora_dropout=0.5).as_upload()
    hidden = torch.randn(1, 6, HIDDEN)

    def adapted() -> AdaptedSpan:
        span = AdaptedSpan(base, upload)
        span.load(upload)
        return span

    ours, other = adapted(), adapted()
    expected = ours.run(*BLOCKS, hidden, seed=7)[0]
    entered, done = threading.Event(), threading.Event()

    def enter(*_: Any) -> None:
        entered.set()
        done.wait(GENEROUS)

    other.layers[0].register_forward_hook(enter)
    thread = threading.Thread(target=other.run, args=(*BLOCKS, hidden), kwargs={"seed": 8})

    def meet(*_: Any) -> None:
        thread.start()
        entered.wait(1.0)  # it is kept from there

    ours.layers[1].self_attn.register_forward_pre_hook(meet)
    got = ours.run(*BLOCKS, hidden, seed=7)[0]
    done.set()
    thread.join()
    assert torch.equal(got, expected)
