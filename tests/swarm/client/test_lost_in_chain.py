"""A server is lost in the middle of a chain: those behind it keep their caches.

They were announced a step that is never pushed to them. What they compute is counted by
themselves: not a token more than in a chain that nothing has happened to. All is compared with the
local model.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scene import NEW_TOKENS, AtToken, Scene, generate, kill_process, scene, stop_then_kill

from swarm_notebook.client.request import Outputs
from swarm_notebook.client.session import pipeline
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.session.step import StepRun
from swarm_notebook.local.swarm import LocalServer

# The first and the second of a chain have doubles, the last one has none.
SPANS = [(0, 2), (2, 4), (4, 5), (0, 2), (2, 4)]
ROWS, PROMPT = 2, 9


@pytest.fixture(scope="module")
def chain(tiny_llama: Path) -> Iterator[Scene]:
    with scene(tiny_llama, SPANS) as made:
        yield made


@pytest.fixture
def stage(chain: Scene) -> Scene:
    return chain.begin()


def facts(stage: Scene, server: LocalServer) -> dict[str, Any]:
    return stage.swarm.info(str(server.peer_id))


class Last:
    """What the last server of the chain has done since this was made."""

    def __init__(self, stage: Scene):
        self.stage, self.server = stage, stage.local.servers[2]
        self.before = facts(stage, self.server)

    def since(self, name: str) -> int:
        return facts(self.stage, self.server)[name] - self.before[name]


def on_the_way(stage: Scene, number: int) -> LocalServer:
    """The server that the latest session has for its first, second or third part."""
    return stage.server(stage.sessions[-1].hops[number].segment.peer)


def change(_module: Any, _inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden + 0.3 * torch.sin(hidden)


LOOKUP = {"prompt_lookup_num_tokens": 3}
# What is generated, the block whose output a hook changes, and how the server is lost.
CASES: dict[str, tuple[dict[str, Any], int | None, Callable[[LocalServer], None]]] = {
    "greedy": ({}, None, stop_then_kill),
    "beams": ({"num_beams": 2}, None, kill_process),
    "prompt lookup": (LOOKUP, None, stop_then_kill),
    "edited before": ({"num_beams": 2}, 1, stop_then_kill),
    "edited behind": (LOOKUP, 4, kill_process),
}


@pytest.mark.parametrize("case", CASES)
def test_what_lies_behind_goes_on(stage: Scene, case: str) -> None:
    options, block, kill = CASES[case]
    ids = stage.ids(1, PROMPT).repeat(1, 2) if options is LOOKUP else stage.ids(ROWS, PROMPT)
    models = [] if block is None else [stage.remote, stage.reference]
    hooks = [model.model.layers[block].register_forward_hook(change) for model in models]
    try:
        undisturbed = Last(stage)
        generate(stage.remote, ids, **options)
        tokens, last = undisturbed.since("tokens_served"), Last(stage)
        acts = AtToken({4: lambda: kill(on_the_way(stage, 1))})
        ours = generate(stage.remote, ids, stopping_criteria=[acts], **options)
        stage.same(ours, generate(stage.reference, ids, **options))
    finally:
        for hook in hooks:
            hook.remove()
    assert stage.sessions[-1].failovers == 1
    assert last.since("sessions_served") == 1
    assert last.since("tokens_served") == tokens


def test_two_are_lost_in_one_step(stage: Scene) -> None:
    ids, last = stage.ids(ROWS, PROMPT), Last(stage)

    def kill() -> None:
        stop_then_kill(on_the_way(stage, 0))
        stop_then_kill(on_the_way(stage, 1), 0.8)

    ours = generate(stage.remote, ids, stopping_criteria=[AtToken({4: kill})])
    stage.same(ours, generate(stage.reference, ids))
    assert stage.sessions[-1].failovers == 2
    assert last.since("sessions_served") == 1
    assert last.since("tokens_served") == ROWS * (PROMPT + NEW_TOKENS - 1)


def test_lost_in_the_parts_of_a_long_text(stage: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts wait behind the lost one; what was said before them is not computed again."""
    monkeypatch.setattr(pipeline, "part_tokens", lambda _span: 64)
    ids, more = stage.ids(3, 12), stage.ids(3, 120, seed=1)
    last, results = Last(stage), []
    for model in (stage.remote, stage.reference):
        first = generate(model, ids)
        if model is stage.remote:
            stop_then_kill(on_the_way(stage, 1))
        longer = torch.cat([first.sequences, more], dim=1)
        results.append(generate(model, longer, past_key_values=first.past_key_values))
    stage.same(*results)
    assert stage.sessions[-1].failovers == 1
    assert last.since("sessions_served") == 1
    assert last.since("tokens_served") == 3 * (12 + 120 + 2 * NEW_TOKENS - 1)


def test_a_turn_is_taken_back_afterwards(stage: Scene) -> None:
    """The last server has positions of a turn that is forgotten; nobody takes them for others."""
    ids, results = stage.ids(1, PROMPT), []
    for model in (stage.remote, stage.reference):
        first = generate(model, ids)
        cache, length = first.past_key_values, PROMPT + 4
        if model is stage.remote:
            stop_then_kill(on_the_way(stage, 1))
        longer = torch.cat([first.sequences, stage.ids(1, 5, seed=1)], dim=1)
        generate(model, longer, past_key_values=cache)
        cache.crop(length - cache.get_seq_length())
        other = torch.cat([first.sequences[:, :length], stage.ids(1, 3, seed=2)], dim=1)
        results.append(generate(model, other, past_key_values=cache))
    stage.same(*results)
    assert stage.sessions[-1].failovers == 1


def test_one_behind_is_gone_too(stage: Scene) -> None:
    """It is asked to go on, does not, and comes back with an empty cache."""
    ids = stage.ids(ROWS, PROMPT)
    last = stage.local.servers[2]
    back = threading.Thread(target=last.restart)

    def kill() -> None:
        stop_then_kill(on_the_way(stage, 1))
        last.kill()
        back.start()

    ours = generate(stage.remote, ids, stopping_criteria=[AtToken({4: kill})])
    back.join()
    stage.same(ours, generate(stage.reference, ids))
    # The last one may be back before it is missed.
    assert stage.sessions[-1].failovers >= 1


def test_interrupted_while_those_behind_are_asked(
    stage: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hang; the interrupt ends the wait, and the conversation goes on when they are back.

    What was interrupted comes to its end when the next step may have begun.
    """
    ids, settle, step_run = stage.ids(1, PROMPT), Hop.settle, StepRun.run
    first = generate(stage.remote, ids)
    last = on_the_way(stage, 2)
    assert last.pid is not None
    asked: list[bool] = []
    goes_on = asyncio.Event()
    main = threading.main_thread().ident
    assert main is not None

    async def interrupted(self: Hop) -> None:
        asked.append(self.owes)
        # Not before: a machine that is busy would find it dead before it is asked.
        os.kill(last.pid, signal.SIGSTOP)
        threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT]).start()
        try:
            await settle(self)
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(goes_on.wait(), 1)

    async def run(self: StepRun, *blocks: int) -> Outputs:
        goes_on.set()
        return await step_run(self, *blocks)

    monkeypatch.setattr(Hop, "settle", interrupted)
    # What a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    # A machine that is busy may have pushed too late, and has kept them apart.
    stage.forgive()
    stop_then_kill(on_the_way(stage, 1))
    longer = torch.cat([first.sequences, stage.ids(1, 5, seed=1)], dim=1)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(stage.remote, longer, past_key_values=first.past_key_values)
    finally:
        signal.signal(signal.SIGINT, before)
        os.kill(last.pid, signal.SIGCONT)
    assert asked == [True]
    monkeypatch.setattr(StepRun, "run", run)
    ours = generate(stage.remote, longer, past_key_values=first.past_key_values)
    local = generate(stage.reference, ids)
    stage.same(ours, generate(stage.reference, longer, past_key_values=local.past_key_values))
