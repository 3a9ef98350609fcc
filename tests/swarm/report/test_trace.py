"""Where time goes: recorded on real servers, watched from other threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from support.scene import NEW_TOKENS, Scene, generate

from swarm_notebook.client.session import pipeline


def test_a_generation_is_traced(tiny_scene: Scene) -> None:
    generate(tiny_scene.remote, tiny_scene.ids(2, 9))
    trace = tiny_scene.swarm.trace()
    assert (trace.tokens, len(trace.passes)) == (NEW_TOKENS, NEW_TOKENS)
    assert repr(trace).endswith("14 tokens in 14 passes, through local-0 [0:2] -> local-1 [2:5]")
    assert "engine of local-0, local-1: plain: " in str(trace)
    for one in trace.passes:
        assert one.client > 0
        for server in one.servers:
            assert server.compute > 0
            assert server.serialisation > 0
            assert min(server.network, server.queue) >= 0
        # What the second server does may seem to take no time on the way.
        assert one.part("network") > 0
    assert len(trace.to_pandas()) == 2 * NEW_TOKENS
    generate(tiny_scene.remote, tiny_scene.ids(1, 3), max_new_tokens=2, min_new_tokens=2)
    assert len(tiny_scene.swarm.trace().passes) == 2


def test_what_was_guessed_right_counts(tiny_scene: Scene) -> None:
    """Also in the first pass, and in the last."""
    again = tiny_scene.ids(1, 4).repeat(1, 5)
    generate(tiny_scene.remote, again, prompt_lookup_num_tokens=5)
    trace = tiny_scene.swarm.trace()
    assert trace.tokens == NEW_TOKENS
    assert any(one.tokens > 1 for one in trace.passes[1:]) or trace.passes[0].tokens > 20


def test_parts_of_a_long_prompt_do_not_count_while_they_wait_for_each_other(
    tiny_scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MIN_PART_TOKENS", 4)
    monkeypatch.setattr(pipeline, "MAX_PART_TOKENS", 4)
    with tiny_scene.swarm.events() as events:
        generate(tiny_scene.remote, tiny_scene.ids(1, 60), max_new_tokens=1, min_new_tokens=1)
        (step,) = events.drain()
    assert len(step.hops) == 2
    for hop in step.hops:
        # What serialises an answer may run on while the next one is waited for.
        assert sum(hop[4:]) < 1.5 * (step.ended - step.began)


def test_events_reach_other_threads(tiny_scene: Scene) -> None:
    seen: list[Any] = []
    with tiny_scene.swarm.events() as events:
        reader = threading.Thread(target=lambda: seen.extend(events))
        reader.start()
        generate(tiny_scene.remote, tiny_scene.ids(2, 9))
    reader.join(10)
    assert [(step.position, step.tokens, step.rows) for step in seen] == [
        (0, 9, 2),
        *((9 + number, 1, 2) for number in range(NEW_TOKENS - 1)),
    ]
    assert [hop.name for hop in seen[0].hops] == ["local-0", "local-1"]
