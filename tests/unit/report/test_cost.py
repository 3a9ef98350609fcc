"""What a run will take and what it took: the counting and the texts."""

from __future__ import annotations

import pytest

from swarm_notebook.client.servers.routing import HOP_SECONDS, Links, RouteSegment
from swarm_notebook.client.telemetry import HopTimes, StepRecord, Usage
from swarm_notebook.net.dht.records import ServerInfo, ServerSpan, ServerState
from swarm_notebook.report.cost import Bill, ServerBill, expect
from swarm_notebook.report.formatting import duration, size


def segment(name: str, start: int, end: int, **rates: float) -> RouteSegment:
    info = ServerInfo(state=ServerState.ONLINE, throughput=100.0, public_name=name, **rates)
    return RouteSegment(ServerSpan(f"peer-{name}", start, end, info), start, end)


CHAIN = [
    segment("a", 0, 2, inference_rps=200.0, forward_rps=2000.0),
    segment("b", 2, 5, inference_rps=300.0, forward_rps=3000.0),
]


RTT = {"peer-a": 0.01, "peer-b": 0.02}


def preview(usage: Usage, **numbers: int):
    options = {"prompt_tokens": 100, "max_new_tokens": 11, "batch": 1, **numbers}
    options.setdefault("answered", options["prompt_tokens"])
    loads = options.pop("loads", [(1000, 1000)] * 2)
    return expect("m", CHAIN, Links(RTT), usage.by_peer(), loads=loads, **options)


def step(tokens: int, seconds: float) -> StepRecord:
    hops = (
        HopTimes("peer-a", "a", 0, 2, 0.0, seconds / 2, 0.0, seconds / 2),
        HopTimes("peer-b", "b", 2, 5, 0.0, seconds, 0.0, 0.0),
    )
    return StepRecord(0, tokens, 1, 0.0, 1.0, hops)


def test_a_preview_rests_on_announced_speed_until_tokens_have_passed() -> None:
    usage = Usage()
    fresh = preview(usage)
    assert (fresh.requests, fresh.servers) == (22, ("a", "b"))
    assert 2 * 110 * 1000 < fresh.sent < 2 * 110 * 1000 + 22 * 300
    assert not fresh.measured
    assert fresh.first_token_seconds == pytest.approx(0.005 + 0.1 + HOP_SECONDS + 0.025 + 0.1)
    assert fresh.seconds == pytest.approx(fresh.first_token_seconds + 10 * (0.05 + HOP_SECONDS))
    usage.passed(step(64, 9.0))  # a prompt says nothing about single tokens
    assert not preview(usage).measured
    for _ in range(20):
        usage.passed(step(1, 0.004))
    known = preview(usage)
    assert known.measured
    assert known.seconds - known.first_token_seconds == pytest.approx(10 * 0.008)
    assert preview(usage, prompt_tokens=1024).requests == (16 + 10) * 2  # a long one in parts
    pushed = preview(usage, loads=[(1000, 1000), (0, 1000)])
    assert (pushed.sent, pushed.received) == (known.sent - 110 * 1000, known.received)
    # Of the prompt's positions, only the last one comes back.
    assert preview(usage, answered=1).received == known.received - 99 * 1000
    assert preview(usage, batch=3).sent > 2.9 * (known.sent - 22 * 300)


@pytest.mark.parametrize("name", ["prompt_tokens", "max_new_tokens", "batch"])
def test_a_preview_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: 0, expected at least 1"):
        preview(Usage(), **{name: 0})


def test_what_varies_is_not_in_the_plain_text() -> None:
    shown = preview(Usage())
    assert repr(shown) == "m: 22 requests to 2 servers, 224 kB up, 221 kB down"
    assert shown.line.endswith(", about 0.7 s")
    assert "seen by a, b" in str(shown)
    html = shown._repr_mimebundle_()["text/html"]
    assert "100 + up to 11 new" in html
    assert "by the announced speed" in html


def test_bills_subtract_and_hide_whom_nothing_was_sent() -> None:
    first = ServerBill("a", "A", ((0, 2),), 3, 30, 1000, 900, 0.5, 1.0)
    later = ServerBill("a", "A", ((0, 2),), 5, 32, 1600, 1400, 0.75, 2.0)
    other = ServerBill("<b>", "B", ((2, 4), (3, 5)), 2, 2, 10, 20, 0.25, 2.0)
    taken = Bill("m", (later, other)) - Bill("m", (first,))
    assert (taken.requests, taken.sent, taken.received, taken.seconds) == (4, 610, 520, 0.5)
    assert taken.line == "4 requests to 2 servers, 610 B up, 520 B down, 0.5 s waiting for servers"
    assert repr(taken) == "m: 4 requests to 2 servers"
    assert "2:5 " in str(taken)  # parts of spans that overlap are told once
    assert "3:5" not in str(taken)
    html = taken._repr_mimebundle_()["text/html"]
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert (taken - taken).servers == ()


def test_sizes_and_durations_for_people() -> None:
    sizes = [0, 999, 1000, 15_340, 999_600, 1_500_000, 123_456_789_000]
    assert [size(count) for count in sizes] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "15.3 kB",
        "1.00 MB",
        "1.50 MB",
        "123 GB",
    ]
    assert [duration(time) for time in (0.0042, 0.5, 90, 600)] == [
        "4.2 ms",
        "0.5 s",
        "90.0 s",
        "10 min",
    ]


def test_a_server_on_both_sides_of_a_block_at_home_is_one() -> None:
    chain = [segment("a", 0, 2), segment("a", 3, 5)]
    loads = [(10, 10), (10, 10)]
    given = {"prompt_tokens": 1, "max_new_tokens": 1, "answered": 1, "batch": 1}
    preview = expect("m", chain, Links(RTT), {}, loads=loads, **given)
    assert preview.servers == ("a",)
    assert preview.requests == 2
