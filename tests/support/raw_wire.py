"""A server process, and a client that speaks the wire to it byte by byte.

The client knows nothing of `swarm_notebook.client`: it packs what a test says, be it nonsense, and
hands back what came.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from support.patience import PATIENCE

from swarm_notebook.local.process import start_server
from swarm_notebook.net.addresses import LOOPBACK
from swarm_notebook.net.membership.certificate import Credentials
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire import protocol, streams, tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.opening import open_stream


class ServerProcess:
    """``swarm-notebook serve`` as its own process; `wait_ready` before use."""

    program: Sequence[str] = ("-m", "swarm_notebook.cli")

    def __init__(self, model: str | Path, log: Path, *options: str, prefix: Sequence[str] = ()):
        command = [*prefix, sys.executable, *self.program, "serve", str(model)]
        command += ["--host-maddrs", *LOOPBACK, "--threads", "1", "--exit-with-stdin", *options]
        self.log = log
        with log.open("w") as stderr:
            self.process = start_server(command, stderr)
        self.facts: dict[str, Any] = {}

    def wait_listening(self) -> None:
        self._read("maddrs")

    def wait_ready(self) -> None:
        self._read("ready")

    def _read(self, key: str) -> None:
        while key not in self.facts:
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server ended:\n{self.log.read_text()}")
            self.facts.update(json.loads(line))

    @property
    def peer(self) -> PeerID:
        return PeerID.from_base58(self.facts["peer_id"])

    def kill(self) -> None:
        """End it and its daemon, if they still live."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class RawClient:
    """Calls servers of a swarm; all in one event loop that runs while a test waits for it."""

    def __init__(self, initial_peers: Sequence[str], credentials: Credentials | None = None):
        self._runner = asyncio.Runner()
        self.node: Node = self.run(Node.start(initial_peers, client=True, credentials=credentials))

    def run(self, work: Any) -> Any:
        return self._runner.run(work)

    def close(self) -> None:
        self.run(self.node.stop())
        self._runner.close()

    async def session(self, peer: PeerID) -> RawSession:
        return RawSession(await open_stream(self.node.p2p, peer, protocol.RPC_INFERENCE))

    async def info(self, peer: PeerID, uid: str = "") -> dict[str, Any]:
        answer = await self.node.p2p.call_protobuf_handler(
            peer, protocol.RPC_INFO, runtime_pb2.ExpertUID(uid=uid), runtime_pb2.ExpertInfo
        )
        return protocol.unpack_metadata(answer.serialized_info)

    async def unary(self, peer: PeerID, rpc: str, message: PackedMessage) -> PackedMessage:
        data = await self.node.p2p._client.call_unary_handler(peer, rpc, message.to_bytes())
        return PackedMessage.of(data)

    async def forward(self, peer: PeerID, message: PackedMessage) -> list[torch.Tensor]:
        answer = await self.unary(peer, protocol.RPC_FORWARD, message)
        return [tensors.unpack(tensor) for tensor in answer.tensors]

    async def forward_stream(
        self, peer: PeerID, messages: Sequence[PackedMessage]
    ) -> list[torch.Tensor]:
        stream = await open_stream(self.node.p2p, peer, protocol.RPC_FORWARD_STREAM)
        for message in messages:
            await stream.send(message)
        await stream.send_end()
        parts: list[PackedTensor] = []
        while (answer := await stream.receive()) is not None:
            parts.extend(answer.tensors)
        stream.close()
        return [tensors.unpack(tensor) for tensor in tensors.join(parts)]


class RawSession:
    """One inference stream."""

    def __init__(self, stream: streams.Stream):
        self.stream = stream

    async def step(self, uid: str, *slots: torch.Tensor | None, **metadata: Any) -> Any:
        """Send a step and receive its tensors; raises the error that comes instead."""
        await self.stream.send(request(uid, *slots, **metadata))
        return await self.receive()

    async def receive(self) -> list[torch.Tensor]:
        async with asyncio.timeout(PATIENCE):
            answer = await self.stream.receive()
        return [tensors.unpack(tensor) for tensor in answer.tensors]

    async def send_bytes(self, data: bytes) -> None:
        self.stream._writer.write(data)
        await self.stream._writer.drain()

    def close(self) -> None:
        self.stream.close()


def request(uid: str, *slots: torch.Tensor | None, **metadata: Any) -> PackedMessage:
    return PackedMessage(
        uid=uid,
        tensors=protocol.pack_slots(list(slots)),
        metadata=protocol.pack_metadata(metadata),
    )
