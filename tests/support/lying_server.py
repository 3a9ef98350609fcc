"""A hostile server: a real peer, in this process, that answers as the test tells it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Self

from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from swarm_notebook.client.loop import LoopThread
from swarm_notebook.net.dht.records import ServerInfo, ServerState
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire import protocol
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.net.wire.stream_server import add_stream_handler
from swarm_notebook.net.wire.streams import Stream

NAME = "liar"
VALID_SECONDS = 600.0

Lie = Callable[[Stream, PackedMessage], Awaitable[None]]


class LyingServer:
    """Announces blocks of a model, all or some, and to be faster than anybody else."""

    lie: Lie
    back: Lie  # of backward passes
    info: bytes

    def __init__(self, peers: Sequence[str], prefix: str, end: int, start: int = 0):
        self._network = LoopThread()
        self._peers, self._prefix, self._blocks = list(peers), prefix, range(start, end)
        facts = protocol.pack_metadata({"sessions": 0})
        self.info = runtime_pb2.ExpertInfo(serialized_info=facts).SerializeToString()

    def __enter__(self) -> Self:
        self._network.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._network.run(self._node.stop())

    @property
    def peer_id(self) -> str:
        return self._node.peer_id.to_base58()

    async def _start(self) -> None:
        self._node = await Node.start(self._peers, client=False)
        for name in (protocol.RPC_INFERENCE, protocol.RPC_FORWARD_STREAM):
            await add_stream_handler(self._node.p2p, name, self._on_stream)
        await add_stream_handler(self._node.p2p, protocol.RPC_BACKWARD_STREAM, self._on_backward)
        await self._node.p2p._client.add_unary_handler(protocol.RPC_INFO, self._on_info)
        await self._announce()

    async def _announce(self) -> None:
        boast = ServerInfo(
            state=ServerState.ONLINE,
            throughput=1e9,
            inference_rps=1e9,
            public_name=NAME,
            torch_dtype="float32",
            swarm_notebook=protocol.PROTOCOL_VERSION,
        )
        count = len(self._blocks)
        keys = [protocol.block_uid(self._prefix, index) for index in self._blocks]
        await self._node.dht.store_many(
            keys,
            [boast.to_record()] * count,
            time.time() + VALID_SECONDS,
            subkeys=[self.peer_id] * count,
        )

    async def _on_info(self, _request: bytes, _peer: PeerID) -> bytes:
        return self.info

    async def _on_stream(self, stream: Stream, _peer: PeerID) -> None:
        while (message := await stream.receive()) is not None:
            await self.lie(stream, message)

    async def _on_backward(self, stream: Stream, _peer: PeerID) -> None:
        first: PackedMessage | None = None
        while (message := await stream.receive()) is not None:
            first = first or message
        if first is not None:
            await self.back(stream, first)
