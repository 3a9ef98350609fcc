"""What peers say of themselves and of errors, where it comes in."""

from __future__ import annotations

from swarm_notebook.client.request import read_report
from swarm_notebook.errors import BadRequest, ServerFailed, from_wire
from swarm_notebook.net.dht.records import parse_record
from swarm_notebook.net.wire import protocol

# An escape that colours, a bell, a new line, and marks that turn a text around.
HOSTILE = "\x1b[31mred\x07\r\n\u202egnol\u2066\u200f \u2028\x9b2J"
SEEN = {character for character in HOSTILE if character.isprintable()}


def is_clean(text: str) -> bool:
    return set(HOSTILE) - SEEN and not set(text) & (set(HOSTILE) - SEEN)


def test_names_in_records() -> None:
    info = parse_record(
        (2, 1.0, {"public_name": HOSTILE, "version": HOSTILE, "adapters": [HOSTILE]})
    )
    assert info is not None
    assert info.public_name is not None
    assert is_clean(info.public_name)
    assert is_clean(f"{info.version}{info.adapters[0]}")
    assert "red" in info.public_name
    honest = parse_record((2, 1.0, {"public_name": "J\u00fcrgens Rechner \u6a5f\u68b0 \U0001f999"}))
    assert honest is not None
    assert honest.public_name == "J\u00fcrgens Rechner \u6a5f\u68b0 \U0001f999"


def test_texts_of_errors() -> None:
    for text, kind in ((f"bad_request: {HOSTILE}", BadRequest), (HOSTILE, ServerFailed)):
        error = from_wire(text, "peer")
        assert type(error) is kind
        assert is_clean(str(error))


def test_why_a_push_has_failed() -> None:
    report = read_report(protocol.pack_metadata({protocol.PUSH_FAILED: HOSTILE}))
    assert "red" in report.push_failed
    assert is_clean(report.push_failed)
