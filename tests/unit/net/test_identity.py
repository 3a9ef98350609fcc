"""Who has signed what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hivemind.p2p import P2P, PeerID
from hivemind.utils import MSGPackSerializer

from swarm_notebook.errors import AddressError
from swarm_notebook.net import node  # noqa: F401 - hivemind is mended when it is imported
from swarm_notebook.net.dht.records import (
    ServerInfo,
    ServerState,
    is_signed,
    parse_record,
    signed_record,
)
from swarm_notebook.net.identity import Identity, is_signature

INFO = ServerInfo(
    state=ServerState.ONLINE,
    throughput=1.5,
    start_block=0,
    end_block=5,
    model="tiny",
    adapters=("a",),
    next_pings={"Qm": float("inf")},
)


@pytest.fixture(params=["Ed25519", "RSA"])
def identity(request: pytest.FixtureRequest, tmp_path: Path) -> Identity:
    if request.param == "Ed25519":
        return Identity.new()
    P2P.generate_identity(str(tmp_path / "rsa"))
    return Identity.read(tmp_path / "rsa")


def test_what_a_peer_signs(identity: Identity) -> None:
    peer, stated = identity.peer_id.to_base58(), identity.stated_key
    assert PeerID.from_identity(identity.file) == identity.peer_id
    signature = identity.sign(b"data")
    assert is_signature(peer, stated, b"data", signature)
    other = Identity.new()
    assert not is_signature(peer, stated, b"date", signature)
    assert not is_signature(peer, stated, b"data", signature[:-1])
    assert not is_signature(peer, stated, b"data", other.sign(b"data"))
    assert not is_signature(other.peer_id.to_base58(), stated, b"data", signature)
    assert not is_signature("Qm", stated, b"data", signature)
    if stated:
        assert not is_signature(peer, b"", b"data", signature)


def test_an_identity_is_kept_in_a_file(tmp_path: Path) -> None:
    made, path = Identity.new(), tmp_path / "key"
    made.write(path)
    assert path.stat().st_mode & 0o777 == 0o400
    assert Identity.read(path).peer_id == made.peer_id
    with pytest.raises(AddressError, match="cannot be written"):
        made.write(path)
    (tmp_path / "rubbish").write_bytes(b"rubbish")
    with pytest.raises(AddressError, match="rubbish"):
        Identity.read(tmp_path / "rubbish")


def travelled(value: Any) -> Any:
    return MSGPackSerializer.loads(MSGPackSerializer.dumps(value))


def test_a_signed_record_speaks_for_its_peer_alone(identity: Identity) -> None:
    peer = identity.peer_id.to_base58()
    record = travelled(signed_record(INFO, identity, 1234.5))
    assert is_signed(peer, record, 1234.5)
    assert is_signed(peer, record, 1234.5)
    found = parse_record(record)
    assert found is not None
    assert (found.state, found.model) == (ServerState.ONLINE, "tiny")
    assert not is_signed(peer, record, 1235.5)
    assert not is_signed(Identity.new().peer_id.to_base58(), record, 1234.5)
    assert not is_signed(peer, (0, *record[1:]), 1234.5)
    for change in ({"end_block": 6}, {"model": "other"}, {"more": 1}, {"signature": "text"}):
        assert not is_signed(peer, (*record[:2], {**record[2], **change}), 1234.5)
    assert not is_signed(peer, INFO.to_record(), 1234.5)
