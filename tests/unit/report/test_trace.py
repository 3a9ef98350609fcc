"""Where time goes, as text and HTML, and who reads of it."""

from __future__ import annotations

import pytest

from swarm_notebook.client.telemetry import Failover, HopTimes, StepRecord, Telemetry, Timeline
from swarm_notebook.report.trace import Trace, from_timeline

HOP = HopTimes("Qm1", "<i>left</i>", 0, 3, 0.001, 0.002, 0.003, 0.004)


def timeline(passes: int) -> Timeline:
    made = Timeline(10.0)
    for number in range(passes):
        tokens, began = (1 if number else 5), 10.005 + 0.020 * number
        position = 4 + number if number else 0
        hops = (HOP, HOP._replace(peer="Qm2", name="right", start=3, end=5))
        made.steps.append(StepRecord(position, tokens, 1, began, began + 0.020 - 0.005, hops))
    return made


def test_a_slow_reader_keeps_the_newest_events() -> None:
    events = Telemetry()
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


def test_parts_of_one_pass_are_one() -> None:
    """Behind a block at home, or a changed state, a pass goes on with another request."""
    telemetry = Telemetry()
    begun = telemetry.begin(10.0)
    for number in range(3):
        began = 10.0 + number
        here = StepRecord(number, 1, 1, began, began + 0.25, (HOP,))
        behind = (HOP._replace(peer="Qm2", name="right", start=4, end=5),)
        telemetry.passed(begun, here)
        telemetry.passed(begun, StepRecord(number, 1, 1, began + 0.5, began + 1, behind, False))
    trace = from_timeline("m", begun)
    assert trace.shape == "3 tokens in 3 passes"
    assert [one.seconds for one in trace.passes] == pytest.approx([1.0] * 3)
    assert telemetry.tokens == 3


def test_text_and_html() -> None:
    made = timeline(4)
    made.failovers.append(Failover("Qm1", "left", 0, 3, "server left is <gone>\n", 11.0))
    trace = from_timeline("/home/me/models/tiny", made)
    assert trace.headline == (
        "4 tokens in 4 passes, 1 server lost on the way; first pass 20.0 ms, "
        "then 20.0 ms per pass, 50.0 tokens/s"
    )
    assert "lost: server left is <gone> " in str(trace)
    html = trace._repr_mimebundle_()["text/html"]
    assert "&lt;i&gt;left" in html
    assert "<i>" not in html
    # Three passes and the way of the mean one; the notebook's part is nothing.
    assert html.count("<rect") == 3 * 4 + 2 * 4
    assert "ms" not in repr(trace)


def test_how_steps_run_is_told_once_for_servers_that_say_the_same() -> None:
    trace = from_timeline("m", timeline(4), engines={"Qm1": "graph", "Qm2": "plain: <old>"})
    assert str(trace).splitlines()[-2:] == [
        "engine of <i>left</i>: graph",
        "engine of right: plain: <old>",
    ]
    assert "engine of right: plain: &lt;old&gt;" in trace.as_html()
    assert list(trace.to_pandas()["engine"][:2]) == ["graph", "plain: <old>"]
    unknown = from_timeline("m", timeline(4))  # as Petals' servers, which say nothing of it
    assert str(unknown).endswith("engine of <i>left</i>, right: unknown")
    assert "unknown" not in repr(unknown)


def test_nothing_was_generated() -> None:
    trace = Trace("m", ())
    assert "nothing generated yet" in str(trace)
    assert "nothing generated yet" in trace._repr_mimebundle_()["text/html"]


def test_blocks_at_home_are_named() -> None:
    trace = from_timeline("m", timeline(4), home=(3, 4))
    assert "blocks 3:5 in the notebook" in repr(trace)
    assert "blocks 3:5 in the notebook" in trace.as_html()
