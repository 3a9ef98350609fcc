"""What peers say of themselves and of others, and what members show: rubbish is nothing, or typed.

Each text is tried as it is, and as something valid in which bytes were changed: that comes further.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.utils import MSGPackSerializer, ValueWithExpiration, get_dht_time
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import seeded, values
from zeroconf.asyncio import AsyncServiceInfo

from swarm_notebook.client.passes.call import _tensor_count
from swarm_notebook.client.request import Request, read_outputs, read_report
from swarm_notebook.client.servers.announced import Announced
from swarm_notebook.client.servers.catalogue import _model_of
from swarm_notebook.client.servers.crowd import Crowd
from swarm_notebook.errors import BadRequest, ClocksDiffer, InvitationError, RemoteError
from swarm_notebook.net import lan
from swarm_notebook.net.dht.records import (
    ServerInfo,
    ServerState,
    announcements,
    is_signed,
    is_signed_bytes,
    signed_record,
    spans_of,
)
from swarm_notebook.net.dht.storage import bound_storage
from swarm_notebook.net.identity import Identity, is_signature
from swarm_notebook.net.membership import joining
from swarm_notebook.net.membership.certificate import (
    Certificate,
    Credentials,
    Membership,
    Role,
    signed_revocations,
)
from swarm_notebook.net.membership.invitation import (
    PREFIX,
    Invitation,
    Redemption,
    Ruling,
    pack_answer,
)
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.streams import UNLIMITED
from swarm_notebook.net.wire.traffic import Traffic
from swarm_notebook.server.rpc.push import PushChannel

fuzz = seeded(50)
FIELDS = [*ServerInfo.model_fields, "record", "record_expires", "unknown"]
changes = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=3)

ME, OTHER = Identity.new(), Identity.new()
SWARM, MEMBER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
KEY = SWARM.public_key().public_bytes_raw()
CERTIFICATE = Certificate(
    Role.SERVER, int(time.time()) + 10**6, MEMBER.public_key().public_bytes_raw()
).signed(SWARM)
REFUSALS = (InvitationError, ClocksDiffer)
CREDENTIALS = Credentials(KEY, MEMBER, CERTIFICATE)
INVITATION = Invitation(
    KEY,
    bytes(8),
    bytes(16),
    Role.SERVER,
    int(time.time()) + 10**6,
    "tiny",
    (f"/ip4/1.2.3.4/tcp/5/p2p/{ME.peer_id.to_base58()}",),
)
INFO = ServerInfo(
    state=ServerState.ONLINE,
    throughput=1.0,
    start_block=0,
    end_block=4,
    next_pings={OTHER.peer_id.to_base58(): 0.1},
    model="tiny",
)


def changed(data: bytes, places: list[tuple[int, int]]) -> bytes:
    found = bytearray(data)
    for place, value in places:
        found[place % len(found)] = value
    return bytes(found)


def typed(work: Callable[[], Any], *kinds: type[Exception]) -> Any:
    """What is made of it, or None if it is refused by an error of these kinds."""
    try:
        return work()
    except kinds as error:
        text = str(error)
    assert len(text) < 2000
    return None


@fuzz
@given(st.binary(max_size=300), changes, st.text(max_size=100))
def test_invitations(data: bytes, places: list[tuple[int, int]], text: str) -> None:
    valid = str(INVITATION)
    mangled = changed(valid.encode(), places).decode("latin-1")
    for one in (text, PREFIX + text, mangled, valid[: len(data)]):
        found = typed(lambda one=one: Invitation.read(one), InvitationError)
        assert found is None or found == INVITATION
    # With a checksum that fits, as whoever means harm would make it.
    packed = str(INVITATION)[len(PREFIX) :]
    raw = decoded(packed)
    for body in (data, changed(raw[:-4], places), raw[:-4][: 80 + len(data)]):
        whole = body + hashlib.sha256(body).digest()[:4]
        typed(lambda whole=whole: Invitation._unpack(whole), InvitationError)


def decoded(body: str) -> bytes:
    return base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))


@fuzz
@given(st.binary(max_size=300), changes, values)
def test_what_members_show(data: bytes, places: list[tuple[int, int]], more: Any) -> None:
    membership = Membership(CREDENTIALS, ME.peer_id)
    peer = OTHER.peer_id.to_base58()
    shown = CREDENTIALS.shown_by(OTHER.peer_id)
    assert membership.holds(peer, shown)
    mangled = changed(shown, places)
    for one in (data, more, mangled, data.ljust(len(shown), b"\0")[: len(shown)]):
        assert not membership.holds(peer, one) or one == shown
    revoked = signed_revocations(SWARM, 1, [bytes(32)])
    mangled = changed(revoked, places)
    for one in (data, more, mangled):
        assert not membership.learn(one) or one == revoked


@fuzz
@given(st.binary(max_size=300), changes)
def test_how_invitations_are_redeemed(data: bytes, places: list[tuple[int, int]]) -> None:
    member = MEMBER.public_key().public_bytes_raw()
    request = Redemption.of(INVITATION, member).pack()
    for one in (data, changed(request, places)):
        found = Redemption.unpack(one)
        # The swarm looks for the invitation by its id, which is another one's then.
        if found is not None and found.is_made_with(INVITATION.secret, KEY):
            assert found.member == member
    answer = pack_answer(Ruling.GRANTED, CERTIFICATE)
    for one in (data, changed(answer, places)):
        found = typed(lambda one=one: joining._granted(one, INVITATION, member), *REFUSALS)
        assert found in (None, CERTIFICATE)


@fuzz
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=4), values, st.text(max_size=50))
def test_records_of_servers(extra: dict[str, Any], value: Any, name: str) -> None:
    now = get_dht_time()
    peer, expires = ME.peer_id.to_base58(), now + 60
    valid = signed_record(INFO, ME, expires)
    assert is_signed(peer, valid, expires)
    mangled = (*valid[:2], {**valid[2], **extra})
    if mangled != valid:
        assert not is_signed(peer, mangled, expires) or mangled[2] == valid[2]
    entries = {
        subkey: ValueWithExpiration(record, expires)
        for subkey, record in ((peer, mangled), (name, valid), (peer + "x", value))
    }
    membership = Membership(CREDENTIALS, OTHER.peer_id)
    # A search finds nothing else: `prefer_signed` drops what has no names.
    for found in (None, ValueWithExpiration([value], 0.0), ValueWithExpiration(entries, expires)):
        for among in (None, membership):
            infos = {one.peer: one.info for one in announcements(found, "tiny", among)}
            spans_of({0: infos, 1: infos})
    assert not is_signature(name, b"", b"data", b"signature")
    packed = typed(lambda: MSGPackSerializer.dumps(mangled), Exception)
    if packed is not None:
        is_signed_bytes(peer, packed, expires)
        is_signed_bytes(name, packed, expires)


@fuzz
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=4), values)
def test_what_servers_say_when_asked(extra: dict[str, Any], value: Any) -> None:
    record = INFO.to_record()
    announced, crowd = Announced("tiny"), Crowd("me")
    node = SimpleNamespace(membership=None)
    expires = get_dht_time() + 60
    for said in (
        {"record": value, "record_expires": expires},
        {"record": (*record[:2], {**record[2], **extra}), "record_expires": expires},
        {"record": record, "record_expires": value, "model": value},
    ):
        announced.told("peer", said, 8)
        announced.holders()
        _model_of(node, "peer", said)
        crowd.told("peer", said.get("record_expires"), 3, time.monotonic())
        crowd.told("peer", value, 3, time.monotonic())


@fuzz
@given(st.binary(max_size=200), changes, values, st.text(max_size=30))
def test_what_is_stored(data: bytes, places: list[tuple[int, int]], key: Any, name: str) -> None:
    node = SimpleNamespace(storage=DHTLocalStorage(), cache=DHTLocalStorage())
    bound_storage(SimpleNamespace(protocol=node))
    storage, expires = node.storage, get_dht_time() + 60
    record = MSGPackSerializer.dumps(signed_record(INFO, ME, expires))
    for value in (data, record, changed(record, places)):
        for subkey in (ME.peer_id.to_base58(), name, key if isinstance(key, int | bytes) else None):
            storage.store("key", value, expires, subkey)
    found = storage.get("key")
    assert found is None or isinstance(found.value, DictionaryDHTValue)


@fuzz
@given(
    st.binary(max_size=200),
    st.dictionaries(st.sampled_from([b"peer", b"model", b"swarm"]), st.binary(max_size=60)),
    st.lists(st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16), max_size=3),
    st.integers(0, 65535),
)
def test_answers_of_the_local_network(
    text: bytes, words: dict[bytes, bytes], addresses: list[bytes], port: int
) -> None:
    valid = {**words, b"peer": ME.peer_id.to_base58().encode()}
    for properties in (text, words, valid):
        kind = "_swarm-notebook._tcp.local."
        service = AsyncServiceInfo(
            kind, f"a.{kind}", addresses=addresses, port=port, properties=properties
        )
        found = lan._read(service)
        assert found is None or (found.addresses and len(found.peer) < 100)


sizes = st.lists(st.sampled_from([0, 1, 2, 3, 8, 2**31 - 1]), max_size=4).map(tuple)
any_tensor = st.builds(
    PackedTensor,
    buffer=st.binary(max_size=200),
    size=sizes,
    dtype=st.sampled_from([*tensors._DTYPES, "", "qint8"]),
    compression=st.sampled_from([0, 1, 2, 3, 4, 5, tensors.INT8]),
    chunks=st.integers(-2, 5),
) | st.sampled_from([tensors.pack(torch.zeros(1, 2, 8)), tensors.pack(torch.zeros(1, 3, 8))])
told = st.dictionaries(
    st.sampled_from(
        [protocol.TIMES_KEY, protocol.PUSH_FAILED, protocol.FILLED, protocol.TENSORS, "other"]
    ),
    values,
)


@fuzz
@given(st.lists(any_tensor, max_size=4), told, st.binary(max_size=100))
def test_answers_of_servers(packed: list[PackedTensor], named: dict[str, Any], data: bytes) -> None:
    request = Request(0, 4, torch.zeros(1, 2, 8), 0, states=(1,), inner=((2, "mlp"),))
    plain = Request(0, 4, torch.zeros(1, 2, 8), 0)
    for one in (request, plain):
        typed(lambda one=one: read_outputs(packed, one, "a server"), RemoteError)
    for metadata in (data, protocol.pack_metadata(named)):
        report = read_report(metadata)
        assert 0.0 <= sum(report.times_within(1.0)) <= 1.0 + 1e-6
        _tensor_count(metadata)


pushed = st.dictionaries(st.sampled_from(["session_id", "step_id", protocol.PUSH_FROM]), values)


@fuzz
@given(st.lists(any_tensor, max_size=2), pushed, st.binary(max_size=100))
def test_pushes(packed: list[PackedTensor], named: dict[str, Any], data: bytes) -> None:
    pushes = PushChannel(Traffic(UNLIMITED, UNLIMITED))
    for metadata in (data, protocol.pack_metadata(named)):
        message = PackedMessage(uid="tiny.1", tensors=packed, metadata=metadata)
        typed(lambda message=message: pushes.take_petals(message), BadRequest)
        typed(lambda message=message: pushes._take("peer", message, 100, 1 << 20), BadRequest)
