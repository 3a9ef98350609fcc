"""What a server says on its standard output."""

from __future__ import annotations

import json
import sys

import pytest

from swarm_notebook.server import process


def test_a_program_reads_facts_and_a_person_addresses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "/ip4/198.51.100.7/tcp/31330/p2p/Q"
    facts = {"peer_id": "Q", "maddrs": [address], "pid": 1}
    process._tell(facts)
    assert json.loads(capsys.readouterr().out) == facts
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    process._tell(facts)
    process._tell({**facts, "ready": True})
    told = capsys.readouterr().out
    assert told.splitlines()[1:] == [f"  {address}"]
    assert "%swarm connect" in told
