"""Where time goes: recorded on real servers, shown as text and HTML, watched from other threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from support.scene import NEW_TOKENS, Scene, generate

from swarm_notebook.client.session.session import pipeline
from swarm_notebook.client.telemetry import Events, Failover, HopTimes, Step, Timeline
from swarm_notebook.report.trace import Trace, from_timeline

HOP = HopTimes("Qm1", "<i>left</i>", 0, 3, 0.001, 0.002, 0.003, 0.004)


def timeline(passes: int) -> Timeline:
    made = Timeline(10.0)
    for number in range(passes):
        tokens, began = (1 if number else 5), 10.005 + 0.020 * number
        position = 4 + number if number else 0
        hops = (HOP, HOP._replace(peer="Qm2", name="right", start=3, end=5))
        made.steps.append(Step(position, tokens, 1, began, began + 0.020 - 0.005, hops))
    return made


def test_a_generation_is_traced(tiny_scene: Scene) -> None:
    generate(tiny_scene.remote, tiny_scene.ids(2, 9))
    trace = tiny_scene.swarm.trace()
    assert (trace.tokens, len(trace.passes)) == (NEW_TOKENS, NEW_TOKENS)
    assert repr(trace).endswith("14 tokens in 14 passes, through local-0 [0:2] -> local-1 [2:5]")
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


def test_a_slow_reader_keeps_the_newest_events() -> None:
    events = Events()
    with events.subscribe(3) as slow:
        begun = events.begin(0.0)
        for step in timeline(5).steps:
            events.passed(begun, step)
        assert [step.position for step in slow.drain()] == [6, 7, 8]
        assert slow.wait(0.01) == []
    events.passed(begun, timeline(1).steps[0])
    assert slow.wait() == []


def test_parts_sum_up_to_the_whole() -> None:
    trace = from_timeline("m", timeline(4))
    first, *later = trace.passes
    assert first.seconds == pytest.approx(0.020)
    assert [one.seconds for one in later] == pytest.approx([0.020] * 3)
    assert later[0].client == pytest.approx(0.0)
    assert trace.tokens == 4
    assert trace.mean is not None
    assert trace.mean.part("compute") == pytest.approx(0.008)


def test_text_and_html() -> None:
    made = timeline(4)
    made.failovers.append(Failover("Qm1", "left", 0, 3, "server left is <gone>\n", 11.0))
    trace = from_timeline("/home/me/models/tiny", made)
    assert trace.headline == (
        "4 tokens in 4 passes, 1 server lost on the way; first pass 20.0 ms, "
        "then 20.0 ms per pass, 50.0 tokens/s"
    )
    assert "lost: server left is <gone>?" in str(trace)
    html = trace._repr_mimebundle_()["text/html"]
    assert "&lt;i&gt;left" in html
    assert "<i>" not in html
    assert html.count("<rect") == 3 * 4  # three passes; the notebook's part is nothing
    assert "ms" not in repr(trace)


def test_nothing_was_generated() -> None:
    trace = Trace("m", ())
    assert "nothing was generated yet" in str(trace)
    assert "nothing was generated yet" in trace._repr_mimebundle_()["text/html"]
