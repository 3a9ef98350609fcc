"""What a server keeps of what strangers store."""

from __future__ import annotations

import pytest
from hivemind.utils import get_dht_time

from swarm_notebook.net.records import MAX_RECORD_BYTES, MAX_SECONDS, MAX_SUBKEYS
from swarm_notebook.net.storage import MAX_KEY_BYTES, BoundedStorage


@pytest.mark.parametrize("subkey", [None, b"name"])
def test_large_and_everlasting_records_are_refused(subkey: bytes | None) -> None:
    storage, soon = BoundedStorage(), get_dht_time() + 60
    assert not storage.store(b"key", b"1", get_dht_time() + 30 * 86400, subkey)
    assert not storage.store(b"key", bytes(MAX_RECORD_BYTES + 1), soon, subkey)
    assert storage.get(b"key") is None
    assert storage.store(b"key", b"1", get_dht_time() + MAX_SECONDS - 1, subkey)


def test_the_records_under_a_key_are_bounded_together() -> None:
    storage, soon = BoundedStorage(), get_dht_time() + 60
    large = bytes(MAX_RECORD_BYTES)
    taken = [storage.store(b"large", large, soon, str(number)) for number in range(200)]
    assert sum(taken) == MAX_KEY_BYTES // MAX_RECORD_BYTES
    small = [storage.store(b"many", b"1", soon, str(number)) for number in range(MAX_SUBKEYS + 9)]
    assert sum(small) == MAX_SUBKEYS
    assert storage.store(b"many", b"2", soon + 1, "0")  # who is there may announce again
