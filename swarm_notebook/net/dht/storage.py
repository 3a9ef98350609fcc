"""What is kept under a key of the DHT, by a server for others and by a reader of several answers.

Anybody can store anything under any key. hivemind keeps it for as long as it says, and of two
records of one name the one that expires later: a false one would shut out whoever it speaks of, and
an answer with all that stands under some keys is lost when it is larger than a message.

So only small records of names that expire soon are kept (nobody in this network stores values
without names). A record that is signed by the peer of its name counts for more than one that is
not, whenever it expires, and so does, on a server, one that this very peer has stored. Where there
is no room, the weaker ones give way. What one peer stores is bounded: of itself, and of others.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from hivemind.dht.node import DHTNode, _SearchState
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import P2PContext
from hivemind.proto import dht_pb2
from hivemind.utils import ValueWithExpiration, get_dht_time
from hivemind.utils.auth import AuthorizerBase
from hivemind.utils.timed_storage import TimedStorage

from swarm_notebook.errors import NotAMember
from swarm_notebook.net.dht.records import (
    MAX_RECORD_BYTES,
    MAX_SECONDS,
    MAX_SUBKEYS,
    is_signed_bytes,
)
from swarm_notebook.net.membership.certificate import Membership, Role

# A search asks for up to 16 keys at once (hivemind's chunk), and an answer above 4 MiB is lost. A
# store asks for the root of their number: 64 for a model of `protocol.MAX_BLOCKS` blocks.
MAX_KEY_BYTES, MAX_KEYS_ASKED = 224 << 10, 64
# Names, times and lengths, beside the values: a peer's id takes 46 to 52 bytes. A record of ours
# takes 500; one that takes less counts as that, as each costs time, too.
ENTRY_BYTES, LEAST_BYTES = 96, 512
# A server with 126 blocks announces some 2 MB of its own within `MAX_SECONDS`. Of others it passes
# on what a newcomer is to keep, a few records for each key.
OWN_BYTES, OTHERS_BYTES, OTHERS_KEY_BYTES = 8 << 20, 2 << 20, MAX_KEY_BYTES // 4
# In all, on one server: a thousand servers with eighty blocks each, kept by five out of a hundred.
MAX_BYTES, MAX_PUBLISHERS = 64 << 20, 4096
COUNT_SECONDS = 1.0  # between two countings of what is held, each of which takes some ten ms

# Who has sent the request that is being answered (base58 id); empty for what this peer stores.
_publisher: contextvars.ContextVar[str] = contextvars.ContextVar("publisher", default="")


@dataclass
class _Published:
    """What one peer has stored since a moment, in bytes."""

    since: float
    own: int = 0
    others: int = 0
    by_key: defaultdict[Any, int] = field(default_factory=lambda: defaultdict(int))

    def admits(self, key: Any, size: int, *, own: bool) -> bool:
        """Whether it may store so much more; counts it if so."""
        if own:
            self.own += size
            return self.own <= OWN_BYTES
        if self.others + size > OTHERS_BYTES or self.by_key[key] + size > OTHERS_KEY_BYTES:
            return False
        self.others += size
        self.by_key[key] += size
        return True


class BoundedStorage(DHTLocalStorage):
    """hivemind's storage, which refuses what no server of ours or Petals' would store."""

    _published: dict[str, _Published]
    _own: set[tuple[Any, Any]]
    _held: int
    _counted: float

    def store(
        self, key: object, value: object, expiration_time: float, subkey: object = None
    ) -> bool:
        """Whether the record was taken; one without a name never is."""
        if subkey is None:
            return False
        return self.store_subkey(key, subkey, value, expiration_time)  # type: ignore[arg-type]

    def store_subkey(
        self, key: object, subkey: object, value: bytes, expiration_time: float
    ) -> bool:
        """Whether one of the records under a key was taken; weaker ones may give way to it."""
        size, publisher = _size(value), _publisher.get()
        own = publisher in ("", subkey)
        if not isinstance(subkey, str) or len(value) > MAX_RECORD_BYTES:
            return False
        if expiration_time > get_dht_time() + MAX_SECONDS:
            return False
        signed = is_signed_bytes(subkey, value, expiration_time)
        if publisher and not self._publisher(publisher).admits(key, size, own=own):
            return False
        if not self._has_room(size, strong=own or signed):
            return False
        found = self.get(key)
        records = found.value if found is not None else None
        if isinstance(records, DictionaryDHTValue) and not self._take_place(
            key, records, subkey, size, own=own, signed=signed
        ):
            return False
        stored: bool = super().store_subkey(key, subkey, value, expiration_time)
        if stored:
            self._held += size
            (self._own.add if own else self._own.discard)((key, subkey))
        return stored

    def _take_place(
        self,
        key: Any,
        records: DictionaryDHTValue,
        subkey: Any,
        size: int,
        *,
        own: bool,
        signed: bool,
    ) -> bool:
        """Make room for a record under a key, if that can be; whether it can."""
        there = {name: _size(entry.value) for name, entry in records.items()}
        if subkey in there and not signed:
            theirs = (key, subkey) in self._own
            if theirs and not own:
                return False
            if own and not theirs and not _is_signed_entry(records, subkey):
                del records[subkey]
        too_much = sum(there.values()) - there.pop(subkey, 0) + size - MAX_KEY_BYTES
        if too_much <= 0:
            return True
        rank = 2 * own + signed
        weaker = []
        for name, taken in there.items():
            its_rank = 2 * ((key, name) in self._own) + _is_signed_entry(records, name)
            if its_rank < rank:
                weaker.append((its_rank, -taken, name))
        for _, taken, name in sorted(weaker):
            del records[name]
            self._own.discard((key, name))
            too_much += taken
            if too_much <= 0:
                return True
        return False

    def _publisher(self, peer: str) -> _Published:
        now = get_dht_time()
        known = self._published.get(peer)
        if known is None or now - known.since > MAX_SECONDS:
            if len(self._published) >= MAX_PUBLISHERS:
                for other, seen in list(self._published.items()):
                    if now - seen.since > MAX_SECONDS:
                        del self._published[other]
            known = self._published[peer] = _Published(now)
        return known

    def _has_room(self, size: int, *, strong: bool) -> bool:
        """Whether so many bytes more are not too many; the last quarter is for strong records."""
        limit = MAX_BYTES if strong else MAX_BYTES * 3 // 4
        if self._held + size <= limit:
            return True
        now = get_dht_time()
        if now - self._counted < COUNT_SECONDS:
            return False
        held, own = 0, set()
        for key, found in self.items():
            if isinstance(found.value, DictionaryDHTValue):
                for name, entry in found.value.items():
                    held += _size(entry.value)
                    if (key, name) in self._own:
                        own.add((key, name))
        self._held, self._own, self._counted = held, own, now
        return held + size <= limit


def _size(value: bytes) -> int:
    return max(len(value) + ENTRY_BYTES, LEAST_BYTES)


class NoCache(DHTLocalStorage):
    """Keeps nothing: what strangers ask to be cached would stand before what is stored."""

    def store(self, *_: object, **__: object) -> bool:
        return False

    store_subkey = store


def bound_storage(dht: DHTNode) -> None:
    """From now on, let a node keep no more than `BoundedStorage` does, and cache nothing."""
    storage = dht.protocol.storage
    storage.__class__, dht.protocol.cache.__class__ = BoundedStorage, NoCache
    storage._published, storage._own, storage._held, storage._counted = {}, set(), 0, 0.0


def prefer_signed() -> None:
    """From now on, of two records of one name the signed one counts, on keepers and for readers.

    A reader asks several keepers and takes from each what the others lack; one that is hostile may
    answer anything. What expires later than anybody's record is nothing, as is a value without
    names: either would end the search, or replace all that others have found.
    """
    if DictionaryDHTValue.store is not _store_preferred:
        DictionaryDHTValue.store = _store_preferred
        _SearchState.add_candidate = _add_believable(_SearchState.add_candidate)
        for name in ("rpc_store", "rpc_find"):
            setattr(DHTProtocol, name, _bounded(getattr(DHTProtocol, name)))
        DHTProtocol.rpc_ping = _answering_strangers(DHTProtocol.rpc_ping)


def _store_preferred(
    records: DictionaryDHTValue, key: Any, value: bytes, expiration_time: float
) -> bool:
    # hivemind compares names of different types, and what it has of them is never right again.
    if not isinstance(key, str) or expiration_time > get_dht_time() + MAX_SECONDS:
        return False
    there = records.data.get(key)
    if there is not None and (there.value, there.expiration_time) != (value, expiration_time):
        signed = is_signed_bytes(key, value, expiration_time)
        before = is_signed_bytes(key, there.value, there.expiration_time)
        if before and not signed:
            return False
        if signed and not before:
            del records[key]
    records.latest_expiration_time = max(records.latest_expiration_time, expiration_time)
    stored: bool = TimedStorage.store(records, key, value, expiration_time)
    return stored


def _is_signed_entry(records: DictionaryDHTValue, name: Any) -> bool:
    entry = records.data[name]
    return is_signed_bytes(name, entry.value, entry.expiration_time)


def _add_believable(add: Any) -> Any:
    def add_candidate(
        search: Any, candidate: ValueWithExpiration | None, source_node_id: Any
    ) -> None:
        if candidate is not None and isinstance(candidate.value, DictionaryDHTValue):
            # A copy: what others answer is merged into it, and it may be what this node keeps.
            found = DictionaryDHTValue()
            for name, entry in itertools.islice(candidate.value.items(), MAX_SUBKEYS):
                found.store(name, entry.value, entry.expiration_time)
            latest = min(candidate.expiration_time, get_dht_time() + MAX_SECONDS)
            add(search, ValueWithExpiration(found, latest), source_node_id)

    return add_candidate


def _bounded(rpc: Any) -> Any:
    @functools.wraps(rpc)
    async def bounded(protocol: DHTProtocol, request: Any, context: P2PContext) -> Any:
        if isinstance(request, dht_pb2.FindRequest) and len(request.keys) > MAX_KEYS_ASKED:
            raise ValueError(f"{len(request.keys)} keys, at most {MAX_KEYS_ASKED} are looked up")
        peer = context.remote_id.to_base58()
        if (members := _members_of(protocol)) is not None:
            role = Role.SERVER if isinstance(request, dht_pb2.StoreRequest) else Role.NOTEBOOK
            members.check(peer, request, role)
        token = _publisher.set(peer)
        try:
            return await rpc(protocol, request, context)
        finally:
            _publisher.reset(token)

    return bounded


class MembersOnly(AuthorizerBase):
    """Shows in each request to the DHT of a private swarm that this peer is a member.

    hivemind's own authorizers sign requests and answers. Here the network knows for certain who
    asks, so what a member shows is enough; it stands in the field of the token's signature.

    Args:
        membership: this peer's.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def check(self, peer: str, request: Any, role: Role) -> None:
        """Let a request of a peer through.

        Raises:
            NotAMember: it may not ask for that.
        """
        self._membership.check(peer, request.auth.client_access_token.signature, role)

    async def sign_request(self, request: Any, service_public_key: Any) -> None:
        request.auth.client_access_token.signature = self._membership.shown

    async def validate_request(self, request: Any) -> bool:
        return True  # `_bounded` does, which knows who asks

    async def sign_response(self, response: Any, request: Any) -> None:
        pass

    async def validate_response(self, response: Any, request: Any) -> bool:
        return True  # what it says is signed, or is believed of nobody


def _members_of(protocol: DHTProtocol) -> MembersOnly | None:
    return protocol.authorizer if isinstance(protocol.authorizer, MembersOnly) else None


def _answering_strangers(rpc_ping: Any) -> Any:
    @functools.wraps(rpc_ping)
    async def answer(protocol: DHTProtocol, request: Any, context: P2PContext) -> Any:
        members = _members_of(protocol)
        # Within another request that was let through, hivemind calls this itself.
        if members is not None and not _publisher.get():
            try:
                members.check(context.remote_id.to_base58(), request, Role.NOTEBOOK)
            except NotAMember:
                # Who has not joined yet learns that this peer is there, and what its clock says.
                request.ClearField("peer")
        return await rpc_ping(protocol, request, context)

    return answer
