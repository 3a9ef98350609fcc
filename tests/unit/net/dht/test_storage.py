"""What a server keeps of what strangers store, and a reader of what keepers answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.dht.node import _SearchState
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.utils import MSGPackSerializer, ValueWithExpiration, get_dht_time

from swarm_notebook.net.dht import storage as storage_module
from swarm_notebook.net.dht.records import (
    MAX_RECORD_BYTES,
    MAX_SECONDS,
    ServerInfo,
    ServerState,
    signed_record,
)
from swarm_notebook.net.dht.storage import (
    ENTRY_BYTES,
    LEAST_BYTES,
    MAX_KEY_BYTES,
    OTHERS_BYTES,
    OTHERS_KEY_BYTES,
    BoundedStorage,
    bound_storage,
    prefer_signed,
)
from swarm_notebook.net.identity import Identity

INFO = ServerInfo(state=ServerState.ONLINE, throughput=1.0, start_block=0, end_block=5, model="m")
UNSIGNED = MSGPackSerializer.dumps(INFO.model_copy(update={"state": 0}).to_record())

prefer_signed()


@pytest.fixture
def storage() -> BoundedStorage:
    protocol: Any = SimpleNamespace(storage=DHTLocalStorage(), cache=DHTLocalStorage())
    bound_storage(SimpleNamespace(protocol=protocol))  # type: ignore[arg-type]
    assert not protocol.cache.store(b"key", b"1", get_dht_time() + 60, subkey="name")
    assert isinstance(protocol.storage, BoundedStorage)
    return protocol.storage


@contextmanager
def sent_by(publisher: str) -> Iterator[None]:
    token = storage_module._publisher.set(publisher)
    try:
        yield
    finally:
        storage_module._publisher.reset(token)


def signed(identity: Identity, expires: float, **changes: Any) -> bytes:
    record = signed_record(INFO.model_copy(update=changes), identity, expires)
    return MSGPackSerializer.dumps(record)


def names(storage: BoundedStorage, key: Any) -> set[Any]:
    found = storage.get(key)
    assert found is not None
    return {name for name, _ in found.value.items()}


def test_large_and_everlasting_and_nameless_records_are_refused(storage: BoundedStorage) -> None:
    soon = get_dht_time() + 60
    assert not storage.store(b"key", b"1", get_dht_time() + 30 * 86400, "name")
    assert not storage.store(b"key", bytes(MAX_RECORD_BYTES + 1), soon, "name")
    assert not storage.store(b"key", b"1", soon)
    assert not storage.store(b"key", b"1", soon, b"a name that is no text")  # type: ignore[arg-type]
    assert storage.get(b"key") is None
    assert storage.store(b"key", b"1", get_dht_time() + MAX_SECONDS - 1, "name")


def test_the_records_under_a_key_are_bounded_together(storage: BoundedStorage) -> None:
    soon, large = get_dht_time() + 60, bytes(MAX_RECORD_BYTES)
    taken = [storage.store(b"large", large, soon, str(number)) for number in range(200)]
    assert sum(taken) == MAX_KEY_BYTES // (MAX_RECORD_BYTES + ENTRY_BYTES)
    small = [storage.store(b"many", b"1", soon, str(number)) for number in range(1000)]
    assert sum(small) == MAX_KEY_BYTES // LEAST_BYTES
    assert storage.store(b"many", b"2", soon + 1, "0")  # who is there may announce again


def test_a_server_finds_room_under_a_key_that_others_have_filled(storage: BoundedStorage) -> None:
    """Unsigned names of strangers give way to signed ones, these to who stores its own record."""
    soon, filled = get_dht_time() + 60, 0
    while filled < MAX_KEY_BYTES:
        with sent_by(f"stranger {filled}"):
            storage.store(b"key", bytes(7000), soon, f"made up {filled}")
        filled += 7000
    first, second = Identity.new(), Identity.new()
    one, two = first.peer_id.to_base58(), second.peer_id.to_base58()
    with sent_by("a keeper that passes it on"):
        assert storage.store(b"key", signed(first, soon), soon, one)
        assert not storage.store(b"key", bytes(7000), soon, "late")
    with sent_by(two):
        assert storage.store(b"key", signed(second, soon), soon, two)
    assert {one, two} <= names(storage, b"key")


def test_what_one_peer_stores_of_others_is_bounded(storage: BoundedStorage) -> None:
    soon, value = get_dht_time() + 60, bytes(5000)
    with sent_by("stranger"):
        at_one = [storage.store(b"key", value, soon, str(number)) for number in range(100)]
        assert sum(at_one) == OTHERS_KEY_BYTES // (len(value) + ENTRY_BYTES)
        everywhere = [storage.store(b"%d" % key, value, soon, "name") for key in range(1000)]
        assert sum(at_one + everywhere) == OTHERS_BYTES // (len(value) + ENTRY_BYTES)
    with sent_by("another"):
        assert storage.store(b"more", value, soon, "more")


def test_all_that_is_kept_is_bounded(
    storage: BoundedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "MAX_BYTES", 100_000)
    soon, value = get_dht_time() + 60, bytes(1000)
    for number in range(200):
        with sent_by(str(number)):
            storage.store(f"key {number}", value, soon, "others")
    assert 70_000 < len(storage) * (len(value) + ENTRY_BYTES) <= 75_000
    with sent_by("itself"):
        assert storage.store("key", value, soon, "itself")


def test_nobody_speaks_against_a_server_itself(storage: BoundedStorage) -> None:
    """A signed record, and an unsigned one that its peer has stored, stay until they expire."""
    soon, later, identity = get_dht_time() + 60, get_dht_time() + 500, Identity.new()
    peer, record = identity.peer_id.to_base58(), signed(identity, soon)
    with sent_by("stranger"):
        assert storage.store("signed", UNSIGNED, later, peer)
        assert storage.store("own", UNSIGNED, later, "petals")
    with sent_by(peer):
        assert storage.store("signed", record, soon, peer)
    with sent_by("petals"):
        assert storage.store("own", b"mine", soon, "petals")
    with sent_by("stranger"):
        assert not storage.store("signed", UNSIGNED, later, peer)
        assert not storage.store("signed", record, later, peer)
        assert not storage.store("own", UNSIGNED, later, "petals")
    assert storage.get("signed").value.get(peer).value == record  # type: ignore[union-attr]
    assert storage.get("own").value.get("petals").value == b"mine"  # type: ignore[union-attr]
    newer = signed(identity, later, end_block=4)
    with sent_by("a keeper that passes it on"):
        assert storage.store("signed", newer, later, peer)


def answer(*records: tuple[str, bytes, float]) -> ValueWithExpiration:
    found = DictionaryDHTValue()
    for name, value, expires in records:
        found.data[name] = ValueWithExpiration(value, expires)
    return ValueWithExpiration(found, max((each[2] for each in records), default=0.0))


def test_a_reader_prefers_what_is_signed() -> None:
    soon, later = get_dht_time() + 60, get_dht_time() + 500
    identity = Identity.new()
    peer, record = identity.peer_id.to_base58(), signed(identity, soon)
    honest = answer((peer, record, soon), ("petals", UNSIGNED, soon))
    forged = answer((peer, UNSIGNED, later), ("petals", b"\x01", get_dht_time() + 86400))
    endless = ValueWithExpiration(forged.value, float("inf"))
    plain = ValueWithExpiration(b"\x01", later + 9)
    loop = asyncio.new_event_loop()
    for order in ([honest, forged, endless, plain], [plain, endless, forged, honest]):
        search = _SearchState("key", float("inf"), future=loop.create_future())  # type: ignore[arg-type]
        for candidate in order:
            search.add_candidate(candidate, source_node_id=None)
        assert not search.finished
        found = search.binary_value
        assert isinstance(found, DictionaryDHTValue)
        assert found.get(peer).value == record  # type: ignore[union-attr]
        assert found.get("petals").value == UNSIGNED  # type: ignore[union-attr]
    loop.close()
    assert len(honest.value.data) == 2
    assert forged.value.data[peer].value == UNSIGNED  # what a keeper holds is left as it is
