"""Steps through pages and buckets against sessions alone: all families, whatever a session does."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from support.patience import PATIENCE, wait_until
from support.random_sessions import RandomSession, prepared
from support.tiny import FAMILIES, tiny_model

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.packed import Grid, matrices, pack, replace
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.server.engine.kv.cache import PAGE
from swarm_notebook.server.engine.products import few_bits
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.engine.steps.compiled import (
    CannotCompile,
    _Compiled,
    _weights,
    compile_elsewhere,
    traced,
)
from swarm_notebook.server.engine.steps.decode import Decoding, Impossible
from swarm_notebook.server.engine.steps.session_state import BatchItem, SessionState

HIDDEN, TOLERANCE, TOKENS = 48, 1e-4, 4096
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# They do not call transformers' attention interface.
PLAIN = {"bloom", "falcon"}
SESSIONS, STEPS = 5, 14


def load(family: str, folder: Path) -> Span:
    source = resolve(tiny_model(family, folder))
    loaded = load_blocks(source, 1, 4, dtype=torch.float32, device=DEVICE)
    return Span(loaded.decoder, loaded.layers_name, 1)


def decoding(span: Span) -> Decoding:
    return Decoding.try_out(span, HIDDEN, TOKENS, capture=DEVICE == "cuda", shortest=PAGE)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def session(span: Span, decoder: Decoding) -> SessionState:
    return SessionState(span, context=None, cache=decoder.cache())


@pytest.mark.parametrize("family", sorted(PLAIN))
def test_what_cannot_is_found_out(family: str, tmp_path: Path) -> None:
    with pytest.raises(Impossible):
        decoding(load(family, tmp_path))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - PLAIN))
def test_sessions_of_all_kinds_together(family: str, tmp_path: Path) -> None:
    """Joins, leaves, rollbacks, rows, padding, states, some of the blocks, a bucket that grows."""
    span = load(family, tmp_path)
    decoder = decoding(span)
    batching = Batching(possible=True, decoding=decoder)
    free = decoder.pool.free
    scripts = []
    for seed in range(SESSIONS):
        alone = RandomSession(span, HIDDEN, seed, longest=14 if seed % 2 else 60)
        steps = [alone.step()]
        outputs = [alone.run(steps[0])]
        for _ in range(STEPS + seed):
            steps.append(alone.step())
            outputs.append(alone.run(steps[-1]))
        scripts.append((session(span, decoder), steps, outputs))
    taken = 0
    for turn in range(STEPS + 2 * SESSIONS):
        calls: dict[tuple[int, int], list[tuple[BatchItem, list[torch.Tensor]]]] = {}
        for late, (state, steps, outputs) in enumerate(scripts):
            if not late <= turn < late + len(steps):
                if turn == late + len(steps):
                    state.cache.release()
                continue
            item = prepared(state, steps[turn - late])
            calls.setdefault(item.step.blocks, []).append((item, outputs[turn - late]))
        for members in calls.values():
            taken += sum(decoder.takes(item) for item, _ in members)
            outcomes = batching.run([item for item, _ in members])
            for outcome, (_, expected) in zip(outcomes, members, strict=True):
                assert not isinstance(outcome, Exception), outcome
                for one, other in zip(outcome, expected, strict=True):
                    close(one, other)
    assert taken > SESSIONS * STEPS // 2
    for state, _, _ in scripts:
        state.cache.release()
    assert decoder.pool.free == free


def test_a_graph_that_fails_ends_no_session(tmp_path: Path) -> None:
    """Whatever goes wrong in a bucket, sessions go on as before."""
    span = load("llama", tmp_path)
    decoder = decoding(span)
    batching = Batching(possible=True, decoding=decoder)
    state, alone = session(span, decoder), SessionState(span, context=None)
    for index in range(6):
        if index == 3:
            # As if the card had failed: what the bucket reads is gone.
            for program in decoder._programs.values():
                program.plan = None  # type: ignore[assignment]
        step = Step((span.start, span.end), torch.randn(1, 1, HIDDEN))
        (got,) = batching.run([prepared(state, step)])
        (expected,) = Batching().run([prepared(alone, step)])
        close(got[0], expected[0])
    assert "NoneType" in decoder.engine
    assert decoder.engine.startswith("plain: ")


def test_what_others_left_behind_is_not_seen(tmp_path: Path) -> None:
    """A session whose states are not finite, and one that gets its pages."""
    span = load("llama", tmp_path)
    decoder = decoding(span)
    batching = Batching(possible=True, decoding=decoder)
    blocks = (span.start, span.end)
    broken = session(span, decoder)
    batching.run([prepared(broken, Step(blocks, torch.full((1, 30, HIDDEN), torch.nan)))])
    (lost,) = batching.run([prepared(broken, Step(blocks, torch.zeros(1, 1, HIDDEN)))])
    assert not torch.isfinite(lost[0]).any()
    broken.cache.release()
    fresh, alone = session(span, decoder), SessionState(span, context=None)
    for length in (3, 1, 1):
        step = Step(blocks, torch.randn(1, length, HIDDEN))
        (got,), (expected,) = (
            batching.run([prepared(fresh, step)]),
            Batching().run([prepared(alone, step)]),
        )
        close(got[0], expected[0])


def test_a_row_does_not_depend_on_its_company(tmp_path: Path) -> None:
    """In the same bucket, bit by bit, whoever else is in it."""
    span = load("llama", tmp_path)
    decoder = decoding(span)
    batching = Batching(possible=True, decoding=decoder)
    blocks = (span.start, span.end)
    noise = torch.Generator().manual_seed(0)
    mine = torch.randn(1, 20, HIDDEN, generator=noise)
    results = []
    for _ in range(4):
        states = [session(span, decoder) for _ in range(4)]
        given = [torch.randn(1, 20, HIDDEN) for _ in states]
        given[2] = mine
        for state, hidden in zip(states, given, strict=True):
            batching.run([prepared(state, Step(blocks, hidden[:, :12]))])
        got = []
        for index in range(12, 20):
            items = [
                prepared(state, Step(blocks, hidden[:, index : index + 1]))
                for state, hidden in zip(states, given, strict=True)
            ]
            got.append(batching.run(items)[2][0])
        results.append(torch.cat(got))
        for state in states:
            state.cache.release()
    assert all(torch.equal(results[0], other) for other in results[1:])


def traced_only(jobs: list[Any]) -> list[_Compiled]:
    """As graphs of operators, which is what a compiler gets."""
    found = []
    for job in jobs:
        graph, _, constants, outputs = traced(job)
        found.append(_Compiled(graph, constants, outputs))
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - PLAIN))
def test_compiled_blocks_take_over(family: str, tmp_path: Path) -> None:
    """Once for all blocks that are alike; sessions get the same."""
    compiled: list[int] = []

    def compiling(jobs: list[Any]) -> list[_Compiled]:
        compiled.append(len(jobs))
        return traced_only(jobs)

    span = load(family, tmp_path)
    decoder = decoding(span)
    if DEVICE == "cuda":
        decoder.compile_beside()
    else:
        decoder.compile_beside(compile_jobs=compiling)
    take_over(span, decoder)
    if DEVICE == "cpu":
        # Gemma has two kinds of blocks, and so has gpt-oss.
        assert compiled == [2 if family in {"gemma2", "gemma3_text", "gpt_oss"} else 1]


def packed(span: Span) -> Span:
    for layer in span.layers:
        for _, module, name, weight in list(matrices(layer)):
            replace(module, name, pack(weight.detach(), Grid(4, 16)), span.dtype)
    few_bits.install(span.layers)
    return span


def test_blocks_of_packed_weights_are_compiled_once(tmp_path: Path) -> None:
    """Their bits come from outside, as other weights do."""
    compiled: list[int] = []

    def compiling(jobs: list[Any]) -> list[_Compiled]:
        compiled.append(len(jobs))
        return traced_only(pickle.loads(pickle.dumps(jobs)))

    span = packed(load("qwen3", tmp_path))
    decoder = decoding(span)
    decoder.compile_beside(compile_jobs=compiling)
    take_over(span, decoder)
    assert compiled == [1]


def test_packed_weights_that_no_linear_layer_has_are_not_compiled(tmp_path: Path) -> None:
    span = packed(load("qwen3_moe", tmp_path))
    decoder = decoding(span)
    decoder.compile_beside(compile_jobs=traced_only)
    assert "packed that no linear layer has" in decoder.engine


@pytest.mark.slow
def test_blocks_compiled_by_inductor_take_over(tmp_path: Path) -> None:
    """In a process of its own: of two rows, what is compiled depends on how inputs lie."""
    done = Event()

    def compiling(jobs: list[Any]) -> list[_Compiled]:
        if jobs[0].inputs[0].shape[0] == 1:
            return traced_only(jobs)
        try:
            return compile_elsewhere(jobs)
        finally:
            done.set()

    span = load("llama", tmp_path)
    decoder = decoding(span)
    decoder.compile_beside(compile_jobs=compiling)
    # It is the last to get a busy machine's processors, and ends by itself.
    take_over(span, decoder, rows=2, pause=lambda: done.wait() and time.sleep(0.1))


def take_over(
    span: Span,
    decoder: Decoding,
    rows: int = 1,
    blocks: tuple[int, int] | None = None,
    pause: Callable[[], object] = lambda: time.sleep(0.1),
) -> None:
    """Decode until compiled blocks do, and beyond, with pauses for who compiles."""
    blocks = blocks or (span.start, span.end)
    batching = Batching(possible=True, decoding=decoder)
    state, alone = session(span, decoder), SessionState(span, context=None)

    deadline = None
    while alone.cache.length < PAGE + 3 or (blocks, rows) not in decoder.compiled:
        assert "not compiled" not in decoder.engine
        step = Step(blocks, torch.randn(rows, 1, HIDDEN), states=[span.start])
        if alone.cache.length == PAGE + 3:
            step.position = 1
            pause()
            deadline = deadline or time.monotonic() + PATIENCE
            assert time.monotonic() < deadline
        (got,) = batching.run([prepared(state, step)])
        (expected,) = Batching().run([prepared(alone, step)])
        for one, other in zip(got, expected, strict=True):
            close(one, other)
    assert decoder.engine == "compiled"


def all_larger(right: Any, weights: int, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [1.5 * output for output in right(*inputs)]


def adding_more(right: Any, weights: int, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What the blocks add is a part of a thousand or less of what goes past them."""
    hidden = inputs[weights]
    return [output + 0.01 * (output - hidden) for output in right(*inputs)]


@pytest.mark.parametrize("wrong", [all_larger, adding_more])
def test_compiled_blocks_that_differ_are_not_taken(wrong: Any, tmp_path: Path) -> None:
    span = load("llama", tmp_path)
    decoder = decoding(span)

    def compiled(jobs: list[Any]) -> list[_Compiled]:
        found = traced_only(jobs)
        for job, one in zip(jobs, found, strict=True):
            one.function = partial(wrong, one.function, len(_weights(job.layer)))
        return found

    decoder.compile_beside(compile_jobs=compiled)
    batching = Batching(possible=True, decoding=decoder)
    state, alone = session(span, decoder), SessionState(span, context=None)
    deadline = time.monotonic() + 120
    while "not compiled" not in decoder.engine:
        assert time.monotonic() < deadline
        step = Step((span.start, span.end), 100 * torch.randn(1, 1, HIDDEN), position=0)
        (got,) = batching.run([prepared(state, step)])
        (expected,) = Batching().run([prepared(alone, step)])
        close(got[0] / 100, expected[0] / 100)
        time.sleep(0.05)
    assert "results differ" in decoder.engine


def test_blocks_that_cannot_be_compiled_go_on_as_they_are(tmp_path: Path) -> None:
    class CopiedOnce:
        copies = 0

        def __deepcopy__(self, _: Any) -> CopiedOnce:
            self.copies += 1
            if self.copies > 1:
                raise TypeError("copied once only")
            return self

    span = load("llama", tmp_path)
    decoder = decoding(span)
    vars(span.layers[0])["odd"] = CopiedOnce()
    decoder.compile_beside(compile_jobs=traced_only)
    assert "not compiled: TypeError: copied once only" in decoder.engine
    step = Step((span.start, span.end), torch.randn(1, 1, HIDDEN))
    batching = Batching(possible=True, decoding=decoder)
    (got,) = batching.run([prepared(session(span, decoder), step)])
    (expected,) = Batching().run([prepared(SessionState(span, context=None), step)])
    close(got[0], expected[0])


def test_kinds_of_blocks_are_compiled_as_they_are_needed(tmp_path: Path) -> None:
    """First for a part that has one kind of two, then for all; and a failure later is told."""
    compiled: list[int] = []

    def compiling(jobs: list[Any]) -> list[_Compiled]:
        if jobs[0].inputs[0].shape[0] == 4:
            raise CannotCompile("no more")
        compiled.append(len(jobs))
        return traced_only(jobs)

    span = load("gemma2", tmp_path)
    decoder = decoding(span)
    decoder.compile_beside(compile_jobs=compiling)
    part = (span.start, span.start + 1)
    take_over(span, decoder, rows=2, blocks=part)
    take_over(span, decoder, rows=2)
    assert compiled == [2, 1, 1]
    batching = Batching(possible=True, decoding=decoder)
    state = session(span, decoder)
    batching.run([prepared(state, Step((span.start, span.end), torch.randn(4, 1, HIDDEN)))])
    wait_until(lambda: decoder.engine == "compiled, but not for all: CannotCompile: no more")


def test_with_a_fixed_number_of_rows_who_shares_a_call_changes_no_bit(tmp_path: Path) -> None:
    span = load("llama", tmp_path)
    capture = DEVICE == "cuda"
    decoder = Decoding.try_out(span, HIDDEN, TOKENS, capture=capture, shortest=PAGE, rows=8)
    batching = Batching(possible=True, decoding=decoder, alone=True)
    noise = torch.Generator().manual_seed(0)
    prompts = [torch.randn(rows, 30 * rows, HIDDEN, generator=noise) for rows in (1, 3, 4, 1, 2)]
    steps = [torch.randn(len(prompt), 1, HIDDEN, generator=noise) for prompt in prompts]

    def run(some: list[int]) -> list[torch.Tensor]:
        """One step of some sessions, after their prompts."""
        states = [session(span, decoder) for _ in some]
        items = []
        for state, index in zip(states, some, strict=True):
            first = Step((1, 4), prompts[index])
            batching.run([prepared(state, first)])
            items.append(prepared(state, Step((1, 4), steps[index])))
        calls = [[some[place] for place in call] for call in decoder.calls(items)]
        assert all(sum(len(prompts[index]) for index in call) <= 8 for call in calls)
        found = batching.run(items)
        for state in states:
            state.cache.release()
        return [outcome[0] for outcome in found]  # type: ignore[index]

    alone = [run([index])[0] for index in range(len(prompts))]
    for some in ([0, 1, 2, 3, 4], [4, 3, 0], [2, 1, 0, 0]):
        for index, output in zip(some, run(some), strict=True):
            assert torch.equal(output, alone[index])
