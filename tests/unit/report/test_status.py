"""What status and route show, as facts, text, HTML and data frames. No network."""

from __future__ import annotations

import dataclasses
import re
import time
from dataclasses import replace

import pytest

from swarm_notebook.client.audit.interface import Outcomes
from swarm_notebook.report.route import RouteHop, RouteTable
from swarm_notebook.report.status import ServerRow, SwarmStatus

PEERS = [
    "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    "QmbLHAnMoJPWSCR5Zhtx6BHJX9KiKNN6tpvbUcqanj75Nb",
    "QmSoLPppuBtQSGwKDZT2M73ULpjvfd3aZ6ha4oFGL1KrGM",
]


@pytest.fixture
def torn() -> SwarmStatus:
    """Ten blocks: 0:4 once, 4:6 twice, 6:8 once; the holder of 8:10 has just failed."""
    return SwarmStatus(
        model="tiny",
        num_blocks=10,
        servers=(
            ServerRow(
                "left",
                PEERS[0],
                0,
                6,
                "online",
                rtt=0.0012,
                block_rps=600.0,
                dtype="float32",
                cache_left=8192,
                version="0.1.0",
            ),
            ServerRow("<b>right</b>\n", PEERS[1], 4, 8, "online", dtype="bfloat16", quant="nf4"),
            ServerRow("gone", PEERS[2], 8, 10, "unreachable", note="timed out"),
        ),
    )


def test_coverage_counts_only_servers_that_answer(torn: SwarmStatus) -> None:
    assert torn.servers_per_block == [1, 1, 1, 1, 2, 2, 1, 1, 0, 0]
    assert torn.missing == [8, 9]
    assert torn.headline == "2 servers online, MISSING blocks 8:10: no server"


def test_blocks_at_home_need_no_server(torn: SwarmStatus) -> None:
    status = dataclasses.replace(torn, home=(5, 8, 9))
    assert status.missing == []
    assert status.home_runs == [(5, 6), (8, 10)]
    assert status.strip == [(0, 4, 1), (4, 6, 2), (6, 8, 1), (8, 10, None)]
    assert "8:10 home" in status.as_html()


def test_a_server_that_claims_too_much_breaks_nothing() -> None:
    status = SwarmStatus("m", 2, (ServerRow("liar", PEERS[0], 1, 500, "online"),))
    assert status.servers_per_block == [0, 1]
    assert "text/html" in status._repr_mimebundle_()


def test_plain_text_has_nothing_that_varies_between_runs(torn: SwarmStatus) -> None:
    assert repr(torn).splitlines() == [
        "tiny: 2 servers online, MISSING blocks 8:10: no server",
        "  server         blocks  state        dtype",
        "  left           0:6     online       float32",
        "  <b>right</b>   4:8     online       bfloat16 (nf4)",
        "  gone           8:10    unreachable  -",
    ]
    assert torn._repr_mimebundle_()["text/plain"] == repr(torn)


def test_printing_tells_all(torn: SwarmStatus) -> None:
    text = str(torn)
    assert PEERS[0] in text
    assert "1.2 ms" in text
    assert " 100 " in text  # 600 tokens/s through a block, six blocks
    assert "8,192" in text
    assert "timed out" in text
    assert text.endswith("servers per block: 0:4 x1, 4:6 x2, 6:8 x1, 8:10 x0")


def test_html_escapes_what_servers_say_and_shouts_about_missing_blocks(torn: SwarmStatus) -> None:
    html = torn._repr_mimebundle_()["text/html"]
    assert "<b>right" not in html
    assert "&lt;b&gt;right" in html
    assert 'class="sn-alarm"' in html
    assert "8:10 none" in html
    whole = SwarmStatus("m", 1, (ServerRow("a", PEERS[0], 0, 1, "online"),))
    assert 'class="sn-alarm"' not in whole._repr_mimebundle_()["text/html"]


def test_what_is_avoided_says_why_and_for_how_long() -> None:
    soon = ServerRow("a", PEERS[0], 0, 2, "unreachable", note="died", retry=time.time() + 8.2)
    now = ServerRow("b", PEERS[1], 0, 2, "failing", retry=time.time() - 60)
    wrong = ServerRow("c", PEERS[2], 0, 2, "found wrong", note="by a")
    status = SwarmStatus("m", 2, (soon, now, wrong))
    html, text = status.as_html(), str(status)
    for shown in ("unreachable (retrying in 8 s)", "failing (retrying now)", "found wrong"):
        assert shown in html
        assert shown in text
    assert html.count('class="sn-dot sn-bad"') == 3
    assert "retrying" not in repr(status)


def test_how_steps_run_is_told_with_the_reason() -> None:
    plain = ServerRow("a", PEERS[0], 0, 2, "online", engine="plain: <no card>")
    rows = (plain, replace(plain, name="b"), replace(plain, name="c", engine="compiled"))
    status = SwarmStatus("m", 2, (*rows, replace(plain, name="petals", engine=None)))
    lines = str(status).splitlines()
    assert [row.engine_kind for row in status.servers] == ["plain", "plain", "compiled", None]
    assert "engine of a, b: plain: <no card>" in lines
    assert not any(line.startswith(("engine of c", "engine of petals")) for line in lines)
    assert '<td title="plain: &lt;no card&gt;">plain</td>' in status.as_html()
    assert list(status.to_pandas()["engine"].dropna())[1:] == ["plain: <no card>", "compiled"]
    assert "compiled" not in repr(status)


def test_audits_are_counted_where_there_are_any() -> None:
    row = ServerRow("a", PEERS[0], 0, 2, "online")
    assert "audits" not in str(SwarmStatus("m", 2, (row,)))
    rows = [replace(row, audits=Outcomes(*found)) for found in ((3, 0, 0), (0, 1, 2), (0, 0, 0))]
    told = ["3 agreed", "1 WRONG, 2 open", "0 agreed"]
    assert [one.audited for one in rows] == told
    status = SwarmStatus("m", 2, tuple(rows))
    for one in told:
        assert one in str(status)
        assert f"<td>{one}</td>" in status.as_html()
    assert list(status.to_pandas()["audits_open"]) == [0, 2, 0]


def test_data_frames(torn: SwarmStatus) -> None:
    frame = torn.to_pandas()
    assert list(frame["blocks"]) == ["0:6", "4:8", "8:10"]
    assert frame["throughput"][0] == 100.0
    assert frame["peer_id"][2] == PEERS[2]


def test_a_model_read_from_a_folder_goes_by_the_folders_name() -> None:
    status = SwarmStatus("/home/somebody/models/tiny", 1, ())
    assert repr(status).startswith("tiny: 0 servers online, MISSING block 0")
    assert "somebody" not in status._repr_mimebundle_()["text/html"]
    assert SwarmStatus("org/tiny", 1, ()).title == "org/tiny"


def test_route() -> None:
    hops = (RouteHop(0, 6, PEERS[0], "left", 2.5), RouteHop(6, 10, PEERS[1], "right", 4.0))
    route = RouteTable("tiny", hops)
    assert repr(route) == "tiny: left [0:6] -> right [6:10]"
    assert route.expected_ms == 6.5
    assert "6.5 ms/token" in str(route)
    assert PEERS[1] in str(route)
    assert "right" in route._repr_mimebundle_()["text/html"]
    assert list(route.to_pandas()["expected_ms"]) == [2.5, 4.0]


def test_a_route_says_no_time_of_blocks_at_home() -> None:
    hops = (RouteHop(0, 6, PEERS[0], "left", 2.5), RouteHop(6, 10, "", "this notebook", 0.0))
    route = RouteTable("tiny", hops)
    assert re.fullmatch(r"  6:10 +this notebook +(\S) +\1", str(route).splitlines()[-1])
    html = route._repr_mimebundle_()["text/html"]
    assert "2.5 ms per token expected, beside the blocks at home" in html
    assert ">0.0<" not in html
