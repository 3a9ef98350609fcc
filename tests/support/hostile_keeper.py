"""A hostile peer of the DHT: it stores at others what it likes, and answers what it likes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Self

from hivemind.dht.node import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer, ValueWithExpiration

from swarm_notebook.client.loop import LoopThread
from swarm_notebook.net.dht.records import ServerInfo, ServerState
from swarm_notebook.net.node import Node

AT_ONCE = 2 << 20  # bytes in one request


def false_record(state: ServerState, start: int = 0, end: int = 5) -> tuple[Any, ...]:
    """What somebody may say of a server that is somebody else's."""
    info = ServerInfo(
        state=state, throughput=1e9, inference_rps=1e9, start_block=start, end_block=end
    )
    return info.to_record()


class HostileKeeper:
    """A full peer of a swarm's DHT, up as long as its context."""

    def __init__(self, peers: Sequence[str]):
        self._network, self._peers = LoopThread(), list(peers)

    def __enter__(self) -> Self:
        self._node: Node = self._network.run(Node.start(self._peers, client=False))
        return self

    def __exit__(self, *_: object) -> None:
        self._network.run(self._node.stop())

    def store_at(
        self, peer: str, key: str, records: dict[Any, Any], seconds: float = 590.0
    ) -> list[bool]:
        """Let a server keep records under a key by their names; which of them it took."""
        packed = {name: MSGPackSerializer.dumps(value) for name, value in records.items()}
        taken: list[bool] = []
        waiting: dict[Any, bytes] = {}
        for name, value in packed.items():
            waiting[name] = value
            if sum(map(len, waiting.values())) > AT_ONCE:
                taken += self._network.run(self._store(peer, key, waiting, seconds))
                waiting = {}
        return taken + self._network.run(self._store(peer, key, waiting, seconds))

    async def _store(
        self, peer: str, key: str, records: dict[Any, bytes], seconds: float
    ) -> list[bool]:
        request = dht_pb2.StoreRequest()
        for name, value in records.items():
            request.keys.append(DHTID.generate(source=key).to_bytes())
            request.subkeys.append(MSGPackSerializer.dumps(name))
            request.values.append(value)
            request.expiration_time.append(time.time() + seconds)
            request.in_cache.append(False)
        stub = self._node.dht.protocol.get_stub(PeerID.from_base58(peer))
        return list((await stub.rpc_store(request)).store_ok)

    def answer(self, key: str, records: dict[str, Any], seconds: float = 590.0) -> None:
        """From now on, say this when somebody looks for a key."""
        found = DictionaryDHTValue()
        for name, value in records.items():
            packed = MSGPackSerializer.dumps(value)
            found.data[name] = ValueWithExpiration(packed, time.time() + seconds)
        self._answer(key, found, time.time() + seconds)

    def answer_plainly(self, key: str, value: Any) -> None:
        """From now on, say that there stands one value, for ever, in the place of records."""
        self._answer(key, MSGPackSerializer.dumps(value), float("inf"))

    def _answer(self, key: str, value: Any, expires: float) -> None:
        storage = self._node.dht.protocol.storage
        storage.__class__ = DHTLocalStorage
        storage.data[DHTID.generate(source=key)] = ValueWithExpiration(value, expires)
