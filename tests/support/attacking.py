"""A server as a stranger sees it, and what attacks on it are made of (`attacks`)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import torch
from hivemind.p2p import PeerID

from swarm_notebook.errors import SwarmError
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire import protocol, streams
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.net.wire.opening import open_stream

RPCS = (
    protocol.RPC_INFERENCE,
    protocol.RPC_PUSH_STREAM,
    protocol.RPC_FORWARD_STREAM,
    protocol.RPC_BACKWARD_STREAM,
)
# What is closed without a reason, or refused by p2pd itself.
BARE = (*streams.TRANSPORT_ERRORS, streams.StreamClosed)


@dataclass
class Target:
    """A server, as seen by a stranger.

    Attributes:
        address: where it is reached, for attacks that come from new peers.
        seconds: how long an attack goes on, or holds what it has.
        frame: bytes of the largest frame that the server reads, about.
        tokens: the longest pass that it takes.
    """

    node: Node
    peer: PeerID
    prefix: str
    blocks: tuple[int, int]
    hidden: int
    seconds: float = 10.0
    frame: int = 10 << 20
    tokens: int = 16384
    address: str = ""
    random: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def uid(self) -> str:
        return protocol.uid_chain(self.prefix, *self.blocks)

    async def open(self, rpc: str) -> streams.Stream:
        return await open_stream(self.node.p2p, self.peer, rpc)

    @contextlib.asynccontextmanager
    async def asking(self, rpc: str) -> AsyncIterator[streams.Stream]:
        """A stream that is ended at once when nothing more is asked."""
        stream = await self.open(rpc)
        try:
            yield stream
        finally:
            stream.abort()

    def request(self, *slots: torch.Tensor | None, **metadata: object) -> PackedMessage:
        return PackedMessage(
            uid=self.uid,
            tensors=protocol.pack_slots(list(slots)),
            metadata=protocol.pack_metadata(metadata),
        )


Errors = list[Exception]
Attack = Callable[[Target], Awaitable[Errors]]


async def many(count: int, work: Callable[[int], Awaitable[None]], at_once: int = 50) -> Errors:
    """What goes wrong in each of many; some of them begin at once."""
    gate, errors = asyncio.Semaphore(at_once), Errors()

    async def one(number: int) -> None:
        try:
            async with gate:
                await work(number)
        except (SwarmError, *BARE) as error:
            errors.append(error)

    await asyncio.gather(*map(one, range(count)))
    return errors


async def hold(target: Target, opened: Sequence[streams.Stream]) -> Errors:
    """Keep streams open for the rest of the attack, and listen to what the server says."""
    errors = Errors()

    async def listen(stream: streams.Stream) -> None:
        try:
            await stream.receive()
        except (SwarmError, *BARE) as error:
            errors.append(error)

    listening = [asyncio.create_task(listen(stream)) for stream in opened]
    if listening:
        await asyncio.wait(listening, timeout=target.seconds)
    for task, stream in zip(listening, opened, strict=True):
        task.cancel()
        stream.abort()
    await asyncio.gather(*listening, return_exceptions=True)
    return errors


async def again(target: Target, attack: Callable[[], Awaitable[Errors]]) -> Errors:
    """An attack over and over, and once at least."""
    until, errors = deadline(target), await attack()
    while time.monotonic() < until:
        errors += await attack()
    return errors


def deadline(target: Target) -> float:
    return time.monotonic() + target.seconds
