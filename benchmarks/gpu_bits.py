"""Blocks in few bits by themselves, for `gpu`: all blocks of a shape in one process, no network.

Steps are those of sessions in one call, as a server runs them: from graphs, then from compiled
blocks. Blocks of random weights are alike, so the grids of the first one are taken for all.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_local import CONTEXT, PROMPT, SHAPES, config, say, sync

ROWS = (1, 32)
STEPS, COMPILE_SECONDS = 40, 60


def remembered(source: Any, start: int, end: int, bits: float) -> None:
    """Have some blocks take the grids that were measured for the first."""
    from swarm_notebook.server.engine.quantising.measuring import GRIDS
    from swarm_notebook.server.engine.quantising.memory import Memory

    asked = (bits, GRIDS)
    Memory.of_blocks(source, start, end, asked).write(
        Memory.of_blocks(source, 0, 1, asked).read() * (end - start)
    )


def remembered_by(servers: int, shape: str, device: str, bits: float) -> None:
    """Measure the first block, for servers that share all."""
    import torch

    from swarm_notebook.local.swarm import plan_spans
    from swarm_notebook.server.engine.quantising.loading import load_quantised

    with dummy(shape) as source:
        load_quantised(source, 0, 1, bits=bits, dtype=torch.bfloat16, device=device)
        for start, end in plan_spans(SHAPES[shape]["num_hidden_layers"], servers):
            remembered(source, start, end, bits)


@contextmanager
def dummy(shape: str) -> Iterator[Any]:
    """A model of a shape, as its servers name it."""
    from swarm_notebook.checkpoint.files.dummy import PREFIX
    from swarm_notebook.checkpoint.files.source import resolve

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / f"{PREFIX}{shape}"
        config(shape).save_pretrained(folder)
        yield resolve(folder, dummy=True)


def stepping(batching: Any, span: Any, rows: int, size: int) -> Any:
    """A session of some rows after its prompt; gives what takes its next step."""
    import torch

    from swarm_notebook.server.engine.requests import Step
    from swarm_notebook.server.engine.steps.session_state import BatchItem, SessionState, run_one

    blocks = (span.start, span.end)
    state = SessionState(span, context=None, cache=batching.new_cache())
    position = 0

    def step(length: int = 1) -> None:
        nonlocal position
        asked = Step(blocks, torch.randn(rows, length, size).to(span.dtype))
        item = BatchItem(state, asked, position, 0, length)
        if length > 1:
            run_one(item)
        else:
            (found,) = batching.run([item])
            if isinstance(found, Exception):
                raise found
        position += length

    step(CONTEXT)
    return step


def load(shape: str, device: str, bits: float | None) -> tuple[Any, dict[str, Any]]:
    """All blocks, and what is to be said of that."""
    import torch

    from swarm_notebook.checkpoint.parts.partial import load_blocks
    from swarm_notebook.server.engine.quantising.loading import load_quantised

    blocks = SHAPES[shape]["num_hidden_layers"]
    how: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    with dummy(shape) as source:
        if bits is None:
            return load_blocks(source, 0, blocks, **how), {"bits": 16}
        for block in (0, 1):  # the second one is not slowed down by what torch loads late
            began = time.perf_counter()
            load_quantised(source, block, block + 1, bits=bits, **how)
            sync(device)
            took = time.perf_counter() - began
        remembered(source, 0, blocks, bits)
        loaded, told = load_quantised(source, 0, blocks, bits=bits, **how)
        return loaded, {"bits": round(told.bits, 2), "quantise_block_s": round(took, 2)}


def alone(shape: str, device: str, bits: float | None) -> None:
    """Load, decode at both numbers of rows, compute a long prompt."""
    import torch

    from swarm_notebook.server.engine.products import few_bits
    from swarm_notebook.server.engine.span import Span
    from swarm_notebook.server.engine.startup import leave_cores_alone
    from swarm_notebook.server.engine.steps.batching import Batching

    blocks, size = SHAPES[shape]["num_hidden_layers"], SHAPES[shape]["hidden_size"]
    loaded, facts = load(shape, device, bits)
    span = Span(loaded.decoder, loaded.layers_name, 0)
    leave_cores_alone()
    began = time.perf_counter()
    few_bits.install(span.layers)
    facts["choose_products_s"] = round(time.perf_counter() - began, 1)
    if device == "cuda":
        facts["weights_gb"] = round(torch.cuda.memory_allocated() / 1e9, 2)
    batching = Batching.try_out(span, size)
    if device == "cuda":
        batching = batching.with_decoding(span, size, (max(ROWS) + 1) * 2 * CONTEXT)
    say(shape, "blocks alone", **facts, prefill_ms=prefill(span, size, device))
    steps = {rows: stepping(batching, span, rows, size) for rows in ROWS}
    for engine in ("graph", "compiled") if device == "cuda" else ("plain",):
        until = time.monotonic() + COMPILE_SECONDS
        for rows, step in steps.items():
            ready = ((0, blocks), rows)
            step(), step()
            while engine == "compiled" and time.monotonic() < until:
                if ready in batching.decoding.compiled or "not" in batching.engine:  # type: ignore[union-attr]
                    break
                time.sleep(0.5)
                step()
            seconds = []
            for _ in range(STEPS):
                began = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - began)
            took = round(1000 * statistics.median(seconds), 2)
            facts = {"bits": facts["bits"], "rows": rows, "ms_per_step": took}
            say(shape, f"blocks alone, {engine}", **facts, engine=batching.engine)


def prefill(span: Any, size: int, device: str) -> float:
    """Milliseconds for a pass of a long prompt."""
    import torch

    hidden = torch.randn(1, PROMPT, size, device=device, dtype=span.dtype)
    best = float("inf")
    for _ in range(3):
        sync(device)
        began = time.perf_counter()
        span.run(span.start, span.end, hidden)
        sync(device)
        best = min(best, time.perf_counter() - began)
    return round(1000 * best, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bits", type=float)
    parser.add_argument("--servers", type=int, help="only measure, for so many that share all")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if options.servers:
        remembered_by(options.servers, options.shape, options.device, options.bits)
    else:
        alone(options.shape, options.device, options.bits)
