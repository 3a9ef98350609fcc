"""One request and one answer over a stream: tensors in parts there, tensors in parts back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hivemind.proto import runtime_pb2

from swarm_notebook.errors import BadRequest, RemoteError
from swarm_notebook.net import protocol, tensors
from swarm_notebook.net.streams import Stream
from swarm_notebook.server.engine.worker import Job

# Between two parts of one message: the largest part takes 34 s at 1 Mbit/s.
STALLED_SECONDS = 60.0


@dataclass
class Received:
    """A request that came in parts; it has what its reader needs of an ``ExpertRequest``."""

    uid: str
    metadata: bytes
    parts: list[runtime_pb2.Tensor]

    @cached_property
    def tensors(self) -> list[runtime_pb2.Tensor]:
        """The tensors, joined from their parts: a copy of all that came (see `codec`)."""
        return tensors.join(self.parts)


async def receive(
    stream: Stream, limit: int, arrived: Callable[[int], None] = lambda _: None
) -> Received:
    """A whole request of at most ``limit`` bytes.

    Args:
        arrived: told the size of every message; may raise to end the request.
    """
    parts: list[runtime_pb2.Tensor] = []
    received, first = 0, None
    while (message := await _next(stream)) is not None:
        first = first or message
        parts.extend(message.tensors)
        received += message.ByteSize()
        try:
            if received > limit:
                raise BadRequest(f"more than {limit} bytes; send less in one request")
            arrived(message.ByteSize())
        except RemoteError:
            parts.clear()
            raise
    if first is None:
        raise BadRequest("the stream ended before a request")
    return Received(first.uid, first.metadata, parts)


async def _next(stream: Stream) -> runtime_pb2.ExpertRequest | None:
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            return await stream.receive(runtime_pb2.ExpertRequest)
    except TimeoutError:
        raise BadRequest(f"no part of the request came for {STALLED_SECONDS:.0f} s") from None


async def send(
    stream: Stream, packed: Iterable[runtime_pb2.Tensor], metadata: dict[str, Any] | None = None
) -> None:
    """An answer; the first message carries the metadata, and says how many tensors there are."""
    packed = list(packed)
    serialized = protocol.pack_metadata({**(metadata or {}), protocol.TENSORS: len(packed)})
    for group in _grouped(packed):
        await stream.send(runtime_pb2.ExpertResponse(tensors=group, metadata=serialized))
        serialized = b""


def pack(outputs: Iterable[torch.Tensor], compression: int) -> list[runtime_pb2.Tensor]:
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
    while await stream.receive(runtime_pb2.ExpertRequest) is not None:
        pass


def _grouped(packed: Iterable[runtime_pb2.Tensor]) -> Iterator[list[runtime_pb2.Tensor]]:
    """Tensors in messages of about `protocol.PART_BYTES`: large ones cut, small ones shared."""
    group: list[runtime_pb2.Tensor] = []
    size = 0
    for tensor in packed:
        for part in tensors.split(tensor, protocol.PART_BYTES):
            if group and size + len(part.buffer) > protocol.PART_BYTES:
                yield group
                group, size = [], 0
            group.append(part)
            size += len(part.buffer)
    yield group
