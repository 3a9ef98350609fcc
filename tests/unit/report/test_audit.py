"""What audits have found, as text, HTML and a data frame."""

from __future__ import annotations

from swarm_notebook.client.audit.comparison import Errors
from swarm_notebook.client.audit.verdicts import AGREED, OPEN, WRONG, Verdict
from swarm_notebook.report.audit import AuditTable
from swarm_notebook.texts import HERE

PEERS = ["12D3KooWA", "12D3KooWB", "12D3KooWC"]
VERDICTS = (
    Verdict(PEERS[0], "ann", 0, 15, 48, AGREED, ("bob",), errors=Errors(48, 48e-7)),
    Verdict(PEERS[1], "<b>mallory</b>", 0, 15, 32, WRONG, ("ann", HERE), "gain 0.02"),
    Verdict(PEERS[2], "eve", 15, 30, 0, OPEN, why="no other server has these blocks"),
)


def table(*verdicts: Verdict, rate: float = 0.02) -> AuditTable:
    return AuditTable("tiny", rate, verdicts)


def test_it_says_what_was_checked_agreed_and_is_open() -> None:
    found = table(*VERDICTS)
    assert found.wrong == (PEERS[1],)
    assert found.headline == "3 audits, 1 agreed, 1 WRONG, 1 OPEN"
    said = str(found)
    for part in ("1.0e-07", "gain 0.02", "ann, this notebook", "nobody", PEERS[2]):
        assert part in said
    assert PEERS[0] not in repr(found)  # the same in every run
    assert table().headline == "0 audits, 0 agreed"
    assert "nothing is audited" in table(rate=0).headline


def test_its_html_escapes_names_and_shouts_about_lies() -> None:
    shown, calm = (
        table(*some).as_html().rpartition("</style>")[2] for some in (VERDICTS, VERDICTS[:1])
    )
    assert "<b>mallory" not in shown
    assert "&lt;b&gt;mallory" in shown
    assert "sn-alarm" in shown
    assert "sn-alarm" not in calm
    for outcome in ("sn-online", "sn-joining", "sn-bad"):
        assert outcome in shown


def test_its_data_frame_has_a_row_each() -> None:
    frame = table(*VERDICTS).to_pandas()
    assert list(frame["outcome"]) == ["agreed", "wrong", "open"]
    assert list(frame["blocks"]) == ["0:15", "0:15", "15:30"]
    assert frame["error"].isna().tolist() == [False, True, True]
    assert list(table().to_pandas().columns) == list(frame.columns)
