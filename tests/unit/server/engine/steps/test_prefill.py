"""A long prompt in chunks, and what a session does after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.random_sessions import prepared
from support.tiny import tiny_model

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.prefill import ChunkedPrefill
from swarm_notebook.server.engine.steps.session_state import SessionState, run_one

HIDDEN, LENGTH = 48, 70


def test_a_padded_session_goes_on_after_it(tmp_path: Path) -> None:
    """The mask that chunks have made is written to by the steps behind."""
    loaded = load_blocks(resolve(tiny_model("llama", tmp_path)), 1, 4, dtype=torch.float32)
    span = Span(loaded.decoder, loaded.layers_name, 1)
    hidden = torch.randn(2, LENGTH + 2, HIDDEN, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :5] = 0
    found = []
    for chunk in (16, LENGTH):
        state = SessionState(span, context=None)
        step = Step((1, 4), hidden[:, :LENGTH], attention_mask=mask)
        item = prepared(state, step)
        prefill = ChunkedPrefill(state, step, item.position)
        while not prefill.finished:
            prefill.run(min(chunk, LENGTH - prefill.computed))
        outputs = [prefill.outputs[0]]
        for position, rows in ((LENGTH, None), (LENGTH + 1, [1, 0])):
            one = Step((1, 4), hidden[:, position : position + 1], row_ids=rows)
            outputs.append(run_one(prepared(state, one))[0])
        found.append(torch.cat(outputs, dim=1))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_positions_that_nobody_gets_are_left_out(tmp_path: Path) -> None:
    loaded = load_blocks(resolve(tiny_model("llama", tmp_path)), 1, 4, dtype=torch.float32)
    span = Span(loaded.decoder, loaded.layers_name, 1)
    hidden = torch.randn(2, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0))

    def outputs(chunk: int, **options: Any) -> list[torch.Tensor]:
        state, step = SessionState(span, context=None), Step((1, 4), hidden, **options)
        step.states = (1,)
        prefill = ChunkedPrefill(state, step, prepared(state, step).position)
        while not prefill.finished:
            prefill.run(min(chunk, LENGTH - prefill.computed))
        return prefill.outputs

    for chunk in (16, LENGTH):
        whole, state = outputs(chunk)
        for last in (0, 1, 30, LENGTH, LENGTH + 1):
            some, same = outputs(chunk, last=last)
            assert some.shape[1] == min(last, LENGTH)
            torch.testing.assert_close(some, whole[:, LENGTH - some.shape[1] :])
            torch.testing.assert_close(same, state)
        assert outputs(chunk, last=1, pushed=True)[0].shape == whole.shape
