"""Many sessions at once on real servers: each gets what it would get alone.

What every session does and should get is worked out beforehand (`random_sessions`), so that their
steps meet on the server as closely as they can.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.bench import Bench, call, relative, run_blocks
from support.patience import PATIENCE
from support.peft_adapters import Tuned, key, random
from support.random_sessions import RandomSession
from support.raw_wire import RawClient, RawSession, request

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import ServerBusy
from swarm_notebook.net.wire import protocol
from swarm_notebook.net.wire.streams import StreamClosed
from swarm_notebook.server.engine.kv import budget as kv_budget
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span

HIDDEN, TOLERANCE = 48, 1e-4
SESSIONS, STEPS = 6, 12
PLAIN = {"bloom"}
# Beyond those that every test of a server has: experts with sinks, soft caps with sliding windows.
FAMILIES = ("bloom", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "llama", "qwen3_moe")


@dataclass
class Script:
    """What a session sends, and what it should get."""

    steps: list[Step]
    outputs: list[list[torch.Tensor]]


@pytest.fixture
def span(bench: Bench) -> Span:
    loaded = load_blocks(resolve(bench.folder), bench.start, bench.end, dtype=torch.float32)
    return Span(loaded.decoder, loaded.layers_name, bench.start)


def script(span: Span, seed: int, steps: int = STEPS, **options: Any) -> Script:
    session, made = RandomSession(span, HIDDEN, seed, **options), Script([], [])
    for _ in range(steps):
        made.steps.append(session.step())
        made.outputs.append(session.run(made.steps[-1]))
    return made


async def send(bench: Bench, session: RawSession, step: Step, **metadata: Any) -> Any:
    uid = protocol.uid_chain(bench.folder.name, *step.blocks)
    mask, ids = step.attention_mask, step.row_ids
    slots = [
        step.hidden,
        None,
        None if ids is None else torch.tensor(ids),
        None if mask is None else mask.to(torch.uint8),
        step.position_ids,
    ]
    if step.position is not None:
        metadata["start_from_position"] = step.position
    return await session.step(uid, *slots, states=list(step.states), max_length=256, **metadata)


def close(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=TOLERANCE, rtol=0)


async def follow(bench: Bench, made: Script, *, client: RawClient | None = None) -> None:
    """Run a script in a session of its own."""
    session = await (client or bench.client).session(bench.server.peer)
    for step, expected in zip(made.steps, made.outputs, strict=True):
        close(await send(bench, session, step), expected)
    session.close()


async def break_off(bench: Bench, made: Script, after: int) -> None:
    """Leave in the middle of a step, as a killed or interrupted notebook does."""
    session = await bench.client.session(bench.server.peer)
    for step, expected in zip(made.steps[:after], made.outputs, strict=False):
        close(await send(bench, session, step), expected)
    left = asyncio.ensure_future(send(bench, session, made.steps[after]))
    await asyncio.sleep(0)
    session.stream.abort()
    with pytest.raises(StreamClosed):
        await left


async def train(bench: Bench, times: int) -> None:
    """Forward and backward requests."""
    hidden, grad = random(4, 20, HIDDEN), random(4, 20, HIDDEN, seed=1)
    leaf = hidden.clone().requires_grad_()
    output = run_blocks(bench.model, bench.start, bench.end, leaf)[-1]
    (expected,) = torch.autograd.grad(output, leaf, grad)
    uid = protocol.uid_chain(bench.folder.name, bench.start, bench.end)
    for _ in range(times):
        slots, rpc = [hidden, grad, None], protocol.RPC_BACKWARD_STREAM
        (got,), _ = await call(bench.client, bench.server.peer, rpc, uid, slots, {})
        assert relative(got, expected) < TOLERANCE


async def settled(bench: Bench, free: int) -> dict[str, Any]:
    """What the server says, once all memory is back or after some seconds."""
    deadline = time.monotonic() + PATIENCE
    while True:
        info = await bench.client.info(bench.server.peer)
        if info["cache_tokens_free"] == free or time.monotonic() > deadline:
            return info
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("bench", FAMILIES, indirect=True)
def test_sessions_that_come_and_go_get_what_they_get_alone(bench: Bench, span: Span) -> None:
    scripts = [script(span, seed) for seed in range(SESSIONS)]
    # Unpadded: what stands in padding depends on how a prefill is cut.
    long = script(span, 98, steps=4, longest=200)
    before = bench.info()

    async def together() -> dict[str, Any]:
        async with asyncio.TaskGroup() as group:
            for made in scripts:
                group.create_task(follow(bench, made))
            group.create_task(follow(bench, long))
            group.create_task(break_off(bench, scripts[0], after=5))
            group.create_task(break_off(bench, scripts[1], after=9))
            group.create_task(train(bench, times=2))
        return await settled(bench, before["cache_tokens_free"])

    after = bench.client.run(together())
    assert after["cache_tokens_free"] == before["cache_tokens_free"]
    assert assert_shared(bench, before) >= (SESSIONS - 1) * STEPS


def assert_shared(bench: Bench, before: dict[str, Any]) -> int:
    """Steps of different sessions have been computed in one call; how many there were."""
    after = bench.info()
    steps, calls = (after[name] - before[name] for name in ("steps", "step_calls"))
    if bench.family in PLAIN:
        assert calls == steps
    else:
        assert calls < 0.8 * steps
    return steps


def test_different_adapters_at_once(bench: Bench, span: Span) -> None:
    """Two notebooks with adapters of the same name, and sessions without one."""
    tuned = [Tuned(bench, "LoraConfig", r=4, seed=seed) for seed in (0, 1)]
    clients = [bench.client, RawClient(bench.server.facts["maddrs"])]
    for own, client in zip(tuned, clients, strict=True):
        own.upload(client=client)
    before = bench.info()
    hidden = random(1, 30, HIDDEN)
    uid = protocol.uid_chain(bench.folder.name, bench.start, bench.end)

    async def decode(client: RawClient, expected: torch.Tensor, **metadata: Any) -> None:
        session = await client.session(bench.server.peer)
        got = await session.step(uid, hidden[:, :10], max_length=40, **metadata)
        for index in range(10, 30):
            got += await session.step(uid, hidden[:, index : index + 1], **metadata)
        assert relative(torch.cat(got, dim=1), expected) < TOLERANCE
        session.close()

    plain = span.run(bench.start, bench.end, hidden)[0]

    async def together() -> None:
        # Each client has a loop of its own; the second one's sessions live in a thread.
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(decode(bench.client, tuned[0].output(hidden), adapter=key()))
                group.create_task(decode(bench.client, plain))
            second = decode(clients[1], tuned[1].output(hidden), adapter=key())
            group.create_task(asyncio.to_thread(clients[1].run, second))

    bench.client.run(together())
    clients[1].close()
    assert_shared(bench, before)


def test_a_client_that_does_not_read_holds_nobody_up(llama: Bench) -> None:
    """Its answers fill all buffers on the way; another session goes on."""
    uid = protocol.uid_chain(llama.folder.name, llama.start, llama.end)
    hidden = random(8, 250, HIDDEN)
    expected = run_blocks(llama.model, llama.start, llama.end, hidden[:1, :20])[-1].detach()

    async def work() -> None:
        deaf = await llama.client.session(llama.server.peer)
        deaf.stream._reader._transport.pause_reading()
        sending = asyncio.ensure_future(flood(deaf))
        session = await llama.client.session(llama.server.peer)
        for index in range(20):
            (got,) = await session.step(uid, hidden[:1, index : index + 1])
            close([got], [expected[:, index : index + 1]])
        assert not sending.done()
        session.close()
        sending.cancel()
        deaf.stream.abort()

    async def flood(deaf: RawSession) -> None:
        while True:
            await deaf.stream.send(request(uid, hidden, start_from_position=0))

    llama.client.run(work())


def test_a_client_that_opens_a_thousand_sessions(llama: Bench) -> None:
    """It gets as many as one may have; another client gets one."""
    uid = protocol.uid_chain(llama.folder.name, llama.start, llama.end)
    greedy, hidden = RawClient(llama.server.facts["maddrs"]), random(1, 1, HIDDEN)
    before = llama.info()

    async def flood() -> list[RawSession]:
        sessions: list[RawSession] = []
        for number in range(kv_budget.CLIENT_SESSIONS + 20):
            sessions.append(await greedy.session(llama.server.peer))
            if number < kv_budget.CLIENT_SESSIONS:
                await sessions[-1].step(uid, hidden)
                continue
            with pytest.raises(ServerBusy, match="128 sessions open here"):
                await sessions[-1].step(uid, hidden)
        return sessions

    try:
        sessions = greedy.run(flood())
        held = llama.info()["sessions"] - before["sessions"]
        assert (held, len(sessions)) == (kv_budget.CLIENT_SESSIONS, kv_budget.CLIENT_SESSIONS + 20)
        session = llama.client.run(llama.client.session(llama.server.peer))
        expected = run_blocks(llama.model, llama.start, llama.end, hidden)[-1].detach()
        close(llama.client.run(session.step(uid, hidden)), [expected])
        session.close()
    finally:
        greedy.close()
    free = before["cache_tokens_free"]
    assert llama.client.run(settled(llama, free))["cache_tokens_free"] == free
