"""Passes without a cache in pieces: the same numbers as in one, and turns for others in between."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.bench import LocalModel, relative
from support.patience import PATIENCE
from support.peft_adapters import Tuned
from support.tiny import tiny_model

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.server.adapters.store import AdapterLimits
from swarm_notebook.server.engine.engine import Engine
from swarm_notebook.server.engine.passes import recording, stateless
from swarm_notebook.server.engine.passes.gradients import SpanGradients
from swarm_notebook.server.engine.requests import Backward, Forward
from swarm_notebook.server.engine.scheduling import turns, worker
from swarm_notebook.server.engine.scheduling.pieces import Pieces, run_whole
from swarm_notebook.server.engine.scheduling.scheduler import Kind, Task
from swarm_notebook.server.engine.scheduling.worker import ComputeThread
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching

BLOCKS, HIDDEN, ROWS, LENGTH, PREFIX = (1, 4), 48, 3, 24, 9
# With so little room every cut is made; with some, groups of rows go through all blocks at once.
ROOMS = [1, 7 * ROWS, 3 * LENGTH * 3]
FAMILIES = ("bloom", "gemma3_text", "qwen3_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def span(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Span:
    return _span(tiny_model(request.param, tmp_path_factory.mktemp("models")))


def _span(folder: Path) -> Span:
    blocks = load_blocks(resolve(folder), *BLOCKS, dtype=torch.float32)
    return Span(blocks.decoder, blocks.layers_name, BLOCKS[0])


def an_engine(span: Span) -> Engine:
    return Engine(span, 1 << 30, AdapterLimits(), Batching())


def options(*, padded: bool = False, prompted: bool = False, **more: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    made: dict[str, Any] = {"hidden": torch.randn(ROWS, LENGTH, HIDDEN), "states": (1, 2), **more}
    if padded:
        made["attention_mask"] = torch.ones(ROWS, LENGTH, dtype=torch.int64)
        made["attention_mask"][1, :5] = made["attention_mask"][2, :17] = 0
    if prompted:
        made["prompts"] = torch.randn(BLOCKS[1] - BLOCKS[0], 1, PREFIX, HIDDEN)
    return made


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor], mask: torch.Tensor | None) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if mask is not None and one.shape[:2] == mask.shape:
            one, other = one * mask[:, :, None], other * mask[:, :, None]
        assert relative(one, other) < 1e-5


KINDS = {"full": {}, "padded": {"padded": True}, "prompts": {"prompted": True, "padded": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_is_the_same_however_it_is_cut(span: Span, kind: str) -> None:
    request = Forward(BLOCKS, **options(**KINDS[kind]))
    whole = run_whole(an_engine(span).forward("me", request))
    for room in ROOMS:
        found = run_whole(an_engine(span).forward("me", request), room)
        close(found, whole, request.attention_mask)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_pass_is_the_same_however_it_is_cut(span: Span, kind: str) -> None:
    made = options(**KINDS[kind])
    grad = torch.randn(ROWS, LENGTH, HIDDEN)
    if "attention_mask" in made:
        grad *= made["attention_mask"][:, :, None]
    request = Backward(BLOCKS, **made, grad=grad)
    whole = run_whole(an_engine(span).backward("me", request))
    kept = Forward(BLOCKS, **made, keep="it")
    for room in (3 * room for room in ROOMS):
        close(run_whole(an_engine(span).backward("me", request), room).tensors, whole.tensors, None)
        engine = an_engine(span)
        run_whole(engine.forward("me", kept), room)
        assert engine.facts()["activation_bytes_held"] > 0
        request.kept, request.release = "it", True
        found = run_whole(engine.backward("me", request), room)
        close(found.tensors, whole.tensors, None)
        request.kept = None


def run_in(pieces: Pieces[SpanGradients], rooms: list[int]) -> SpanGradients:
    """The result of pieces with these rooms, the last of them again and again."""
    next(pieces)
    for room in itertools.chain(rooms, itertools.repeat(rooms[-1])):
        try:
            pieces.send(room)
        except StopIteration as end:
            found: SpanGradients = end.value
            return found
    raise AssertionError


@pytest.mark.parametrize("seed", [None, 5], ids=["plain", "dropout"])
def test_gradients_of_an_adapter(tmp_path: Path, seed: int | None) -> None:
    folder = tiny_model("llama", tmp_path)
    engine = an_engine(_span(folder))
    dropout = 0.0 if seed is None else 0.3
    upload = Tuned(LocalModel(folder, *BLOCKS), "LoraConfig", lora_dropout=dropout).as_upload()
    engine.load_adapter("me", upload)
    made = options(padded=True, adapter=(upload.id, upload.version), seed=seed)
    request = Backward(BLOCKS, **made, grad=torch.randn(ROWS, LENGTH, HIDDEN))
    whole = run_whole(engine.backward("me", request))
    assert whole.weights
    # In the last, the first row goes block by block, and the others at once.
    for rooms in ([1], [100], [1000], [1, 1 << 30]):
        found = run_in(engine.backward("me", request), rooms)
        assert found.weights is not None
        order = [found.weights.index(name) + 3 for name in whole.weights]
        tensors = [*found.tensors[:3], *(found.tensors[index] for index in order)]
        close(tensors, whole.tensors, None)


def test_modules_inside_of_blocks(tmp_path: Path) -> None:
    span = _span(tiny_model("llama", tmp_path))
    wanted = ((3, "mlp"), (1, "self_attn"), (1, "mlp.up_proj"))
    for keep in (None, "it"):
        request = Forward(BLOCKS, **options(inner=wanted, keep=keep))
        whole = run_whole(an_engine(span).forward("me", request))
        close(run_whole(an_engine(span).forward("me", request), 1), whole, None)


def test_what_is_too_long_to_be_kept_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MAX_RECORDED", ROWS * LENGTH - 1)
    engine = an_engine(_span(tiny_model("llama", tmp_path)))
    request = Forward(BLOCKS, **options(), keep="it")
    run_whole(engine.forward("me", request), 64)
    assert engine.facts()["activation_bytes_held"] == 0
    run_whole(engine.forward("me", request))
    assert engine.facts()["activation_bytes_held"] > 0


def _counting(pieces: int, log: list[str], name: str) -> Pieces[str]:
    yield 0
    for _ in range(pieces - 1):
        log.append(name)
        yield 10
    log.append(name)
    return name


def test_passes_of_two_clients_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every piece takes as long: turns go by time, and a machine that is busy gives some more of it.
    clock = itertools.count()
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: next(clock) / 100))

    async def main() -> list[str]:
        compute, log, gate = ComputeThread(), [], threading.Event()
        try:
            compute.submit(gate.wait)
            tasks = [Task(Kind.STATELESS, name, 10, blocks=1, work=50) for name in "aab"]
            jobs = [
                compute.submit(_counting, 5, log, f"{task.client}{number}", task=task)
                for number, task in enumerate(tasks)
            ]
            gate.set()
            assert [await job.future for job in jobs] == ["a0", "a1", "b2"]
        finally:
            compute.stop()
        return log

    log = asyncio.run(main())
    # The second client is done long before the first, whose own passes keep their order.
    assert log.index("a1") > max(index for index, name in enumerate(log) if name == "a0")
    assert max(index for index, name in enumerate(log) if name == "b2") < 12
    assert "b2" in log[:3]


def test_a_chunk_of_a_long_row_takes_little_memory() -> None:
    for rows, length in ((1, 16384), (4, 4096), (1, 100)):
        request = Forward(BLOCKS, torch.empty(rows, length, HIDDEN, device="meta"))
        size = stateless.chunk_size(request, 1 << 30, length)
        assert 4 * rows * size * length <= 16 << 20
        assert size >= min(length, 256)


def test_a_long_pass_lets_who_decodes_have_every_second_turn() -> None:
    rooms: list[int] = []
    a_second = 100_000  # of work

    def passing(work: int) -> Pieces[None]:
        room = yield 0
        while (work := work - room) > 0:
            rooms.append(room)
            time.sleep(room / a_second)
            room = yield room

    async def main() -> None:
        compute = ComputeThread()
        task = Task(Kind.STATELESS, "a", blocks=1, work=2 * a_second)
        job = compute.submit(passing, task.work, task=task)
        try:
            for _ in range(40):
                step = compute.submit(time.sleep, 0.002, task=Task(Kind.STEP, "b", 1))
                await step.future
        finally:
            job.cancel()
            compute.stop()

    asyncio.run(main())
    # A piece is as long as a step and the way to the next one, not as long as it might be.
    assert statistics.median(rooms[-20:]) < 0.75 * turns.CROWDED_SECONDS * a_second


def test_a_pass_that_is_given_up_ends_with_its_piece() -> None:
    async def main() -> None:
        compute, log = ComputeThread(), []
        running, gate = threading.Event(), threading.Event()
        settled = asyncio.Event()

        def endless() -> Pieces[None]:
            try:
                yield 0
                while True:
                    running.set()
                    gate.wait()
                    log.append("piece")
                    yield 1
            finally:
                log.append("closed")

        try:
            job = compute.submit(endless, task=Task(Kind.STATELESS, "me", work=100))
            await asyncio.to_thread(running.wait)
            job.cancel()
            assert not job.settled
            job.on_settled(settled.set)
            gate.set()
            # At its kind's next turn, which comes later the longer the piece has taken.
            await asyncio.wait_for(settled.wait(), PATIENCE)
            assert log == ["piece", "closed"]
        finally:
            compute.stop()

    asyncio.run(main())
