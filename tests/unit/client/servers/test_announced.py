"""What is believed of who serves what, from readings of the DHT that may miss records."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hivemind.utils import ValueWithExpiration, get_dht_time

from swarm_notebook.client.servers import announced as announced_module
from swarm_notebook.client.servers.announced import Announced
from swarm_notebook.net.dht.records import (
    MAX_SECONDS,
    MAX_SUBKEYS,
    ServerInfo,
    ServerState,
    signed_record,
)
from swarm_notebook.net.identity import Identity
from swarm_notebook.net.membership.authority import Authority
from swarm_notebook.net.membership.certificate import Membership

PEER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
OTHER = "QmbLHAnMoJPWSCR5Zhtx6BHJX9KiKNN6tpvbUcqanj75Nb"


def record(start: int, end: int, state: ServerState = ServerState.ONLINE) -> Any:
    info = ServerInfo(state=state, throughput=1.0, start_block=start, end_block=end)
    return info.to_record()


def reading(seconds: float = 60.0, **entries: Any) -> ValueWithExpiration:
    expires = time.time() + seconds
    named = {"peer": PEER, "other": OTHER, "rubbish": "no peer"}
    found = {named[name]: ValueWithExpiration(value, expires) for name, value in entries.items()}
    return ValueWithExpiration(found, expires)


def holders(announced: Announced) -> dict[int, list[str]]:
    return {block: sorted(found) for block, found in announced.holders().items()}


def test_a_record_that_a_reading_misses_is_believed_until_it_expires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announced = Announced()
    announced.update(0, reading(30, peer=record(0, 1)))
    announced.update(0, reading(60, other=record(0, 1)))
    announced.update(0, None)
    assert holders(announced) == {0: [PEER, OTHER]}
    later = get_dht_time() + 31
    monkeypatch.setattr(announced_module, "get_dht_time", lambda: later)
    announced.update(0, None)
    assert holders(announced) == {0: [OTHER]}


def test_the_newest_record_counts_for_all_blocks() -> None:
    announced = Announced()
    announced.update(0, reading(60, peer=record(0, 2)))
    announced.update(1, reading(60, peer=record(0, 2)))
    announced.update(1, reading(90, peer=record(1, 3)))
    announced.update(2, reading(90, peer=record(1, 3)))
    assert holders(announced) == {0: [], 1: [PEER], 2: [PEER]}
    announced.update(2, reading(99, peer=record(1, 3, ServerState.OFFLINE)))
    announced.update(1, reading(50, peer=record(1, 3)))  # an old one, from a slow keeper
    states = {found[PEER].state for found in announced.holders().values() if found}
    assert states == {ServerState.OFFLINE}


def test_rubbish_is_not_believed() -> None:
    announced = Announced()
    announced.update(0, reading(60, peer=("online", 1.0, {}), rubbish=record(0, 1)))
    announced.update(1, ValueWithExpiration(b"rubbish", time.time() + 60))
    assert holders(announced) == {0: [], 1: []}


def test_offline_in_somebody_elses_name_is_over_with_the_next_announcement() -> None:
    announced, now = Announced(), time.time()
    for block in (0, 1):
        announced.update(block, reading(120, peer=record(0, 2)), now)
    forged = reading(MAX_SECONDS - 10, peer=record(0, 2, ServerState.OFFLINE))
    announced.update(0, forged, now + 10)
    assert {found[PEER].state for found in announced.holders().values()} == {ServerState.OFFLINE}
    announced.update(0, forged, now + 20)
    announced.update(1, reading(180, peer=record(0, 2)), now + 20)
    assert {found[PEER].state for found in announced.holders().values()} == {ServerState.ONLINE}


def test_a_record_that_is_valid_for_a_month_is_none() -> None:
    announced = Announced()
    announced.update(0, reading(60, peer=record(0, 1)))
    announced.update(0, reading(30 * 86400, peer=record(0, 1, ServerState.OFFLINE)))
    assert announced.holders()[0][PEER].state == ServerState.ONLINE


def test_a_reader_takes_so_many_records_of_a_key() -> None:
    announced = Announced()
    expires = time.time() + 60
    many = {f"rubbish {number}": ValueWithExpiration(b"", expires) for number in range(MAX_SUBKEYS)}
    many[PEER] = ValueWithExpiration(record(0, 1), expires)
    announced.update(0, ValueWithExpiration(many, expires))
    assert holders(announced) == {0: []}


def signed(identity: Identity, expires: float, **fields: Any) -> Any:
    known = {"state": ServerState.ONLINE, "throughput": 1.0, "start_block": 0, "end_block": 2}
    return signed_record(ServerInfo(**{**known, "model": "tiny", **fields}), identity, expires)


def found(expires: float, **entries: Any) -> ValueWithExpiration:
    return ValueWithExpiration(
        {peer: ValueWithExpiration(value, expires) for peer, value in entries.items()}, expires
    )


@pytest.mark.parametrize("first", ["signed", "forged"])
def test_what_is_unsigned_never_counts_against_what_is_signed(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, announced, soon = Identity.new(), Announced("tiny"), time.time() + 60
    peer = identity.peer_id.to_base58()
    readings = [
        found(soon, **{peer: signed(identity, soon)}),
        found(soon + 400, **{peer: record(0, 2, ServerState.OFFLINE)}),
    ]
    for reading_ in readings if first == "signed" else reversed(readings):
        announced.update(0, reading_)
    announced.update(1, readings[1])
    assert announced.holders()[0][peer].state == ServerState.ONLINE
    assert peer not in announced.holders()[1]
    assert not announced.doubtful()
    later = get_dht_time() + 120  # the signed one has expired, the forged one has not
    monkeypatch.setattr(announced_module, "get_dht_time", lambda: later)
    fresh = Announced("tiny")
    fresh.update(0, readings[1])
    assert fresh.doubtful() == {peer}
    announced.update(1, None)
    announced.update(0, readings[1])
    assert peer not in announced.holders()[0]


def test_a_signature_that_does_not_hold_makes_no_record() -> None:
    identity, announced, soon = Identity.new(), Announced("tiny"), time.time() + 60
    peer = identity.peer_id.to_base58()
    announced.update(0, found(soon + 1, **{peer: signed(identity, soon)}))
    announced.update(0, found(soon, **{OTHER: signed(identity, soon)}))
    announced.update(0, found(soon, **{peer: signed(identity, soon, model="another")}))
    assert holders(announced) == {0: []}


def test_a_signed_offline_counts_at_once() -> None:
    identity, announced, soon = Identity.new(), Announced("tiny"), time.time() + 60
    peer = identity.peer_id.to_base58()
    announced.update(0, found(soon, **{peer: signed(identity, soon)}))
    left = signed(identity, soon + 1, state=ServerState.OFFLINE)
    announced.update(1, found(soon + 1, **{peer: left}))
    announced.update(0, found(soon, **{peer: signed(identity, soon)}))
    assert {known[peer].state for known in announced.holders().values()} == {ServerState.OFFLINE}


def test_a_span_is_believed_only_as_its_server_states_it() -> None:
    """What it hands out when it is asked, whatever was announced, in its name or by itself."""
    identity, announced, soon = Identity.new(), Announced("tiny"), time.time() + 60
    peer = identity.peer_id.to_base58()
    for block in range(5):
        longer = signed(identity, soon + 400, start_block=0, end_block=5)
        announced.update(block, found(soon + 400, **{peer: longer}))
    answer = {"record": signed(identity, soon, end_block=2), "record_expires": soon}
    announced.told(peer, answer, 5)
    assert holders(announced) == {0: [peer], 1: [peer], 2: [], 3: [], 4: []}
    fresh = Announced("tiny")
    for rubbish in ({}, {"record": 1}, {**answer, "record_expires": time.time() + 1e5}):
        announced.told(peer, rubbish, 5)
        fresh.told(peer, rubbish, 5)
    assert not fresh.holders()
    assert holders(announced)[0] == [peer]
    fresh.told(peer, {"record": signed(identity, soon, end_block=99), "record_expires": soon}, 5)
    assert holders(fresh) == {block: [peer] for block in range(5)}
    moved = {"record": signed(identity, soon, model="another"), "record_expires": soon}
    fresh.told(peer, moved, 5)
    assert not any(fresh.holders().values())


def test_a_private_swarm_believes_its_servers_alone(tmp_path: Path) -> None:
    swarm, soon = Authority(tmp_path / "swarm"), time.time() + 60
    server, thief = Identity.new(), Identity.new()
    reader = Membership(swarm.owner(), Identity.new().peer_id)
    shown = swarm.owner().shown_by(server.peer_id)
    elsewhere = Authority(tmp_path / "other").owner().shown_by(thief.peer_id)

    def said(identity: Identity, member: bytes | None) -> Any:
        info = ServerInfo(state=ServerState.ONLINE, throughput=1.0, model="tiny", member=member)
        info = info.model_copy(update={"start_block": 0, "end_block": 2})
        return signed_record(info, identity, soon)

    def believed(identity: Identity, value: Any) -> bool:
        peer, announced = identity.peer_id.to_base58(), Announced("tiny", reader)
        announced.update(0, found(soon, **{peer: value}))
        told = Announced("tiny", reader)
        told.told(peer, {"record": value, "record_expires": soon}, 2)
        assert (peer in told.holders().get(0, {})) == (peer in announced.holders()[0])
        return peer in announced.holders()[0]

    assert believed(server, said(server, shown))
    for member in (None, b"", shown, elsewhere):
        assert not believed(thief, said(thief, member))
    # Of somebody else's record nothing is believed that its peer has not signed.
    peer, announced = server.peer_id.to_base58(), Announced("tiny", reader)
    unsigned = said(server, shown)
    unsigned[2]["signature"] = bytes(64)
    announced.update(0, found(soon, **{peer: unsigned}))
    del unsigned[2]["signature"]
    announced.update(0, found(soon, **{peer: unsigned}))
    assert not announced.holders()[0]
    # What was believed is not any more once its server is revoked.
    announced.update(0, found(soon, **{peer: said(server, shown)}))
    assert peer in announced.holders()[0]
    reader._revoked = frozenset({reader.check(peer, shown).name})
    assert not announced.holders()[0]
    assert not announced.times()
