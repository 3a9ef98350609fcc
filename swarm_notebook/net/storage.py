"""What a server keeps for others in the DHT: small records that expire soon.

Anybody can store anything under any key, and hivemind keeps it as long as it says. A record that
expires later also wins over an earlier one of the same name: a false one, valid for a month, would
shut out whoever it speaks of.
"""

from __future__ import annotations

from hivemind.dht.node import DHTNode
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.utils import get_dht_time

from swarm_notebook.net.records import MAX_RECORD_BYTES, MAX_SECONDS, MAX_SUBKEYS

# An answer with all that stands under a key is lost above 4 MiB (`protocol.MAX_UNARY_BYTES`).
MAX_KEY_BYTES = 3 << 20


class BoundedStorage(DHTLocalStorage):
    """hivemind's storage, which refuses what no server of ours or Petals' would store."""

    def store(
        self, key: object, value: object, expiration_time: float, subkey: object = None
    ) -> bool:
        """Whether the record was taken, which is refused if it is too large or valid too long."""
        if expiration_time > get_dht_time() + MAX_SECONDS:
            return False
        if isinstance(value, bytes) and len(value) > MAX_RECORD_BYTES:
            return False
        stored: bool = super().store(key, value, expiration_time, subkey)
        return stored

    def store_subkey(
        self, key: object, subkey: object, value: bytes, expiration_time: float
    ) -> bool:
        """The same for one of the records under a key, which are bounded together."""
        size = len(value)
        if size > MAX_RECORD_BYTES or expiration_time > get_dht_time() + MAX_SECONDS:
            return False
        found = self.get(key)
        if found is not None and isinstance(found.value, DictionaryDHTValue):
            others = {name: entry for name, entry in found.value.items() if name != subkey}
            held = sum(len(entry.value) for entry in others.values())
            if len(others) >= MAX_SUBKEYS or held + size > MAX_KEY_BYTES:
                return False
        stored: bool = super().store_subkey(key, subkey, value, expiration_time)
        return stored


def bound_storage(dht: DHTNode) -> None:
    """From now on, let a node keep no more than `BoundedStorage` does."""
    dht.protocol.storage.__class__ = BoundedStorage
