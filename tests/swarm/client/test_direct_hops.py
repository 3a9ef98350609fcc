"""States that go from server to server: exact in every mode, and when something is in the route.

Three servers in a row and a double of the middle one. Everything is compared with the local model.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.patience import within
from support.scene import TOLERANCE, AtToken, Scene, generate, kill_process, scene, stop_then_kill

from swarm_notebook.client.request import Request
from swarm_notebook.client.session import pipeline
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.session.writer import StepRoute
from swarm_notebook.net.dht.records import ServerInfo, ServerSpan, ServerState

SPANS = [(0, 2), (2, 4), (4, 5), (2, 4)]


@dataclass
class Sent:
    """The routes of all steps that were sent, and those whose states were sent again."""

    routes: list[StepRoute] = field(default_factory=list)
    again: list[StepRoute] = field(default_factory=list)
    positions: list[tuple[int, int]] = field(default_factory=list)  # first block, and how many back

    from_notebook: set[int] = field(default_factory=set)  # first blocks of hops that got it there
    pushed_to: set[int] = field(default_factory=set)  # and of those that got it from a server

    @property
    def direct(self) -> int:
        return sum(route.push_from is not None for route in self.routes)


@pytest.fixture(scope="module")
def chain(tiny_llama: Path) -> Iterator[Scene]:
    with scene(tiny_llama, SPANS) as made:
        yield made


@pytest.fixture
def stage(chain: Scene) -> Scene:
    return chain.begin()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    seen, send, resend = Sent(), Hop.send, Hop.resend

    async def counted(self: Hop, request: Request, route: StepRoute) -> float:
        seen.routes.append(route)
        seen.positions.append((self.start, request.output_shape[1]))
        (seen.pushed_to if route.push_from else seen.from_notebook).add(self.start)
        return await send(self, request, route)

    async def counted_again(self: Hop, request: Request, route: StepRoute) -> None:
        seen.again.append(route)
        await resend(self, request, route)

    monkeypatch.setattr(Hop, "send", counted)
    monkeypatch.setattr(Hop, "resend", counted_again)
    return seen


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "hidden states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_exact(stage: Scene, sent: Sent, mode: str) -> None:
    ids = stage.ids(1, 9).repeat(1, 2)
    ours = generate(stage.remote, ids, **MODES[mode])
    theirs = generate(stage.reference, ids, **MODES[mode])
    stage.same(ours, theirs)
    for mine, local in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
        for state, expected in zip(mine, local, strict=True):
            torch.testing.assert_close(state, expected, atol=TOLERANCE, rtol=0)
    # All servers but the first get their input from the one before; nothing goes twice.
    assert sent.from_notebook == {0}
    assert sent.pushed_to >= {2, 4}
    assert not sent.again
    assert stage.sessions[-1].failovers == 0


def test_a_padded_batch(stage: Scene, sent: Sent) -> None:
    batch = stage.padded()
    stage.same(generate(stage.remote, batch), generate(stage.reference, batch))
    assert sent.direct


def test_a_hook_that_writes_within_a_span_and_one_at_its_edge(stage: Scene, sent: Sent) -> None:
    def add(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.3 * torch.sin(output)

    ids = stage.ids(2, 9)
    hooks = [
        model.model.layers[block].register_forward_hook(add)
        for model in (stage.remote, stage.reference)
        for block in (1, 2)
    ]
    try:
        stage.same(generate(stage.remote, ids), generate(stage.reference, ids))
    finally:
        for hook in hooks:
            hook.remove()
    assert sent.direct


def test_a_long_prompt_keeps_all_servers_busy(
    stage: Scene, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "part_tokens", lambda _span: 128)  # it is measured, and varies
    ids = stage.ids(3, 200)
    stage.same(generate(stage.remote, ids), generate(stage.reference, ids))
    parts = len({route.step_id for route in sent.routes}) - 13
    assert parts == 4
    # Of the last blocks one position comes back, of the others what caches are rebuilt from.
    returned = {start: [n for first, n in sent.positions if first == start] for start in (0, 2, 4)}
    assert returned == {
        0: [50] * 4 + [1] * 13,
        2: [50] * 4 + [1] * 13,
        4: [0, 0, 0, 1] + [1] * 13,
    }
    assert stage.sessions[-1].length == 1


def test_parts_are_large_enough_for_the_server() -> None:
    def span(
        single: float | None = None, many: float | None = None, said: int | None = None
    ) -> ServerSpan:
        info = ServerInfo(
            state=ServerState.ONLINE,
            throughput=1.0,
            inference_rps=single,
            forward_rps=many,
            part_tokens=said,
        )
        return ServerSpan("Qm", 0, 1, info)

    def tokens(*said: Any) -> int:
        return pipeline.part_tokens(span(*said))

    assert tokens(1000.0, 30_000.0) == 120
    assert tokens(1000.0, 1000.0) == pipeline.MIN_PART_TOKENS
    assert tokens(1e-9, 1e300) == pipeline.MAX_PART_TOKENS
    assert tokens(None, 5.0) == tokens(0.0, 5.0) == pipeline.PART_TOKENS
    # What a server says of it itself counts, in bounds.
    assert tokens(1000.0, 1000.0, 1024) == 1024
    assert tokens(None, None, 1) == pipeline.MIN_PART_TOKENS

    def parts(length: int, *servers: ServerSpan) -> int:
        return pipeline.part_count(length, 1, servers)

    card, old = span(said=1024), span(1000.0, 30_000.0)
    assert [parts(length, card) for length in (1, 1023, 2048, 3500, 8192)] == [1, 1, 2, 3, 4]
    small = span(said=64)
    assert [parts(length, small) for length in (512, 1024, 8192)] == [1, 2, 4]
    assert parts(8192, old) == 1
    assert [parts(length, card, old) for length in (1, 2048, 1 << 20)] == [1, 2, 16]


def test_a_long_padded_prompt_with_states_asked_for(
    stage: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "part_tokens", lambda _span: 64)
    ids, mask = stage.ids(3, 200), torch.ones(3, 200, dtype=torch.long)
    ids[1, :150], mask[1, :150] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        found = [
            model(**inputs, use_cache=True, output_hidden_states=True)
            for model in (stage.remote, stage.reference)
        ]
    for ours, theirs in zip(*(one.hidden_states for one in found), strict=True):
        kept = mask.bool()
        torch.testing.assert_close(ours[kept], theirs[kept], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kill", [stop_then_kill, kill_process])
def test_the_middle_server_is_lost(stage: Scene, kill: Any) -> None:
    """While it computes: the one before it has done its part, the one behind waits."""
    ids = stage.ids(2, 9)
    options: dict[str, Any] = {"num_beams": 2}
    acts = AtToken({4: lambda: kill(stage.server(stage.sessions[-1].hops[1].segment.peer))})
    ours = generate(stage.remote, ids, stopping_criteria=[acts], **options)
    stage.same(ours, generate(stage.reference, ids, **options))
    assert stage.sessions[-1].failovers == 1


def test_the_middle_server_is_lost_in_a_long_prompt(
    stage: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its part of the prompt is sized, so it is asked, whatever a ping finds meanwhile."""
    sized: list[str] = []

    def of_64_tokens(span: ServerSpan) -> int:
        sized.append(span.peer)
        if len(sized) == 2:
            os.kill(stage.server(span.peer).pid, signal.SIGSTOP)
        return 64

    monkeypatch.setattr(pipeline, "part_tokens", of_64_tokens)
    ids = stage.ids(3, 200)
    try:
        with within(20):
            ours = generate(stage.remote, ids)
    finally:
        os.kill(stage.server(sized[1]).pid, signal.SIGCONT)
    stage.same(ours, generate(stage.reference, ids))
    assert stage.sessions[-1].failovers == 1


@pytest.mark.parametrize("fault", ["unknown session", "no such peer"])
def test_a_push_that_does_not_arrive(
    stage: Scene, sent: Sent, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The client sends the states after all, and from then on by itself."""
    nobody = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
    init = pipeline._PushGroup.__init__

    def misled(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        route = self._routes[0]
        if route.push_to is not None:
            wrong = (route.push_to[0], "lost") if fault == "unknown session" else (nobody, "lost")
            self._routes[0] = replace(route, push_to=wrong)

    monkeypatch.setattr(pipeline._PushGroup, "__init__", misled)
    ids = stage.ids(2, 9)
    ours = generate(stage.remote, ids)
    stage.same(ours, generate(stage.reference, ids))
    # The second and third server are a group of their own then, which is misled as well.
    # A server that is busy may be sent them once more.
    assert 2 <= len(sent.again) <= 4
    assert stage.sessions[-1].failovers == 0
