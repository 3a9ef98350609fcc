"""One request and one answer over a stream: tensors in parts there, tensors in parts back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.streams import SLOWEST_BYTES, Stream
from swarm_notebook.net.wire.traffic import COPIES
from swarm_notebook.server.engine.scheduling.worker import Job

# Between two parts of one message: the largest part takes 34 s at 1 Mbit/s.
# For every part of a request, and for all of it, which gets more time as it grows.
STALLED_SECONDS = 60.0
# For every message of an answer, which has up to `protocol.PART_BYTES`.
UNREAD_SECONDS = 20.0


@dataclass
class Received:
    """A request that came in parts; it has what its reader needs of an ``ExpertRequest``.

    Attributes:
        size: bytes of all its messages.
    """

    uid: str
    metadata: bytes
    parts: list[PackedTensor]
    size: int

    @cached_property
    def tensors(self) -> list[PackedTensor]:
        """The tensors, joined from their parts: a copy of all that came (see `codec`)."""
        parts, self.parts = self.parts, []
        return tensors.join(parts)


async def receive(stream: Stream, limit: int) -> Received:
    """A whole request of at most ``limit`` bytes, which the stream's account holds."""
    parts: list[PackedTensor] = []
    received, first = 0, None
    began = asyncio.get_running_loop().time()
    while (message := await _next(stream, began + received / SLOWEST_BYTES)) is not None:
        first = first or message
        parts.extend(message.tensors)
        received += stream.size
        if received > limit:
            parts.clear()
            raise BadRequest(f"more than {limit} bytes; send less in one request")
        stream.account.resize(COPIES * received)
    if first is None:
        raise BadRequest("the stream ended before a request")
    return Received(first.uid, first.metadata, parts, received)


async def _next(stream: Stream, since: float) -> PackedMessage | None:
    try:
        async with asyncio.timeout_at(since + STALLED_SECONDS):
            return await stream.receive()
    except TimeoutError:
        raise BadRequest(
            f"the request did not get on for {STALLED_SECONDS:.0f} s; send it in one go"
        ) from None


async def send(
    stream: Stream, packed: Iterable[PackedTensor], metadata: dict[str, Any] | None = None
) -> None:
    """An answer; the first message carries the metadata, and says how many tensors there are."""
    packed = list(packed)
    serialized = protocol.pack_metadata({**(metadata or {}), protocol.TENSORS: len(packed)})
    for group in _grouped(packed):
        message = PackedMessage(tensors=group, metadata=serialized)
        await stream.answer(message, UNREAD_SECONDS)
        serialized = b""


def pack(outputs: Iterable[torch.Tensor], compression: int) -> list[PackedTensor]:
    """Tensors for the wire; only floating point is compressed."""
    return [
        tensors.pack(output, compression if output.is_floating_point() else tensors.NONE)
        for output in outputs
    ]


async def result(job: Job, stream: Stream | None = None) -> Any:
    """What a job returns; if the peer leaves the stream, the job is given up.

    Raises:
        StreamClosed: the peer has left.
    """
    leaving = asyncio.ensure_future(_left(stream)) if stream is not None else None
    waited: set[asyncio.Future[Any]] = {job.future} | ({leaving} if leaving else set())
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not job.future.done() and leaving is not None:
            leaving.result()
        return await job.future
    finally:
        if not job.settled:
            job.cancel()
        if leaving is not None:
            leaving.cancel()
            # Until it has let go of the stream; what it found came too late to matter.
            await asyncio.gather(leaving, return_exceptions=True)
        # What is raised here knows this frame, and these know what was raised.
        del leaving, waited


async def _left(stream: Stream) -> None:
    """Wait until the peer has said its last or is gone."""
    held = stream.account.held
    while await stream.receive() is not None:
        stream.account.resize(held)


def _grouped(packed: Iterable[PackedTensor]) -> Iterator[list[PackedTensor]]:
    """Tensors in messages of about `protocol.PART_BYTES`: large ones cut, small ones shared."""
    group: list[PackedTensor] = []
    size = 0
    for tensor in packed:
        for part in tensors.split(tensor, protocol.PART_BYTES):
            if group and size + len(part.buffer) > protocol.PART_BYTES:
                yield group
                group, size = [], 0
            group.append(part)
            size += len(part.buffer)
    yield group
