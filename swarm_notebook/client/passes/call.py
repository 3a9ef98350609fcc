"""One request over a stream of its own: tensors there, tensors back, for all without a cache.

A tensor larger than a message is cut in parts, as hivemind streams them; each request message
carries one part, as Petals' servers read them. An answer may carry several tensors per message.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment, describe_blocks
from swarm_notebook.client.watch import Watch, open_stream, seconds_elsewhere
from swarm_notebook.errors import BadRequest, ServerFailed
from swarm_notebook.net.wire import protocol, streams, tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor

# Metadata, and what surrounds tensors in messages.
ANSWER_SLACK = 2 << 20
# What each message of an answer counts besides its bytes.
MESSAGE_BYTES = 64


@dataclass
class CallAnswer:
    """What came back: tensors still packed, and the metadata of the first message.

    Attributes:
        size: bytes of all messages.
    """

    tensors: list[PackedTensor]
    metadata: dict[str, Any]
    size: int


def server_name(segment: RouteSegment) -> str:
    """What to call the server of a segment in messages."""
    return f"server {segment.span.name} ({describe_blocks(range(segment.start, segment.end))})"


async def call(
    directory: Directory,
    segment: RouteSegment,
    rpc: str,
    slots: Sequence[torch.Tensor | None],
    metadata: Mapping[str, Any],
    *,
    always: int,
    most: int,
    compression: int = tensors.NONE,
) -> CallAnswer:
    """Ask the server of a segment once.

    Args:
        rpc: one of protocol's streaming RPCs.
        slots: the tensors by position; None becomes a dummy.
        always: how many slots travel in any case (see `protocol.pack_slots`).
        most: how many bytes the answer may have.
        compression: of the first slot.

    Raises:
        RemoteError: what the server says; ServerGone if it gives no sign of life, ServerFailed if
            it hangs.
    """
    server = server_name(segment)
    usage, began = directory.telemetry.usage, time.perf_counter()
    stream = await open_stream(directory, segment.peer, server, rpc, usage.open(segment))
    size = sum(slot.nbytes for slot in slots if slot is not None)
    watch = Watch(
        directory,
        segment.peer,
        server,
        lambda: f"{server} ({rpc.rpartition('.')[2]})",
        stream.abort,
        # An answer is about as large as what was sent.
        elsewhere=seconds_elsewhere(segment, _tokens(slots), 2 * size),
    )
    try:
        with watch:
            uid = protocol.uid_chain(directory.prefix, segment.start, segment.end)
            packed = protocol.pack_metadata(dict(metadata))
            messages = (
                PackedMessage(uid=uid, tensors=[part], metadata=packed)
                for tensor in protocol.pack_slots(list(slots), always, compression)
                for part in tensors.split(tensor, protocol.PART_BYTES)
            )
            parts, answered, size = await _exchange(stream, messages, most)
        usage.answered(segment, _tokens(slots), time.perf_counter() - began)
    finally:
        stream.abort()
        stream.account.close()
    try:
        return CallAnswer(tensors.join(parts), protocol.unpack_metadata(answered), size)
    except BadRequest as error:
        raise ServerFailed(f"{server} sent no readable answer: {error}") from None


def _tokens(slots: Sequence[torch.Tensor | None]) -> int:
    """How many tokens of all sequences the hidden states in the first slot are."""
    hidden = slots[0]
    return 0 if hidden is None or hidden.ndim != 3 else hidden.shape[0] * hidden.shape[1]


async def _exchange(
    stream: streams.Stream, messages: Iterable[PackedMessage], most: int
) -> tuple[list[PackedTensor], bytes, int]:
    """Send a request and receive its answer, which is a refusal if it comes before all is sent."""
    receiving = asyncio.create_task(_receive(stream, most))
    try:
        with contextlib.suppress(streams.StreamClosed):  # whoever receives hears why
            for message in messages:
                await stream.send(message)
                if receiving.done():
                    break
            else:
                await stream.send_end()
        return await receiving
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)


async def _receive(stream: streams.Stream, most: int) -> tuple[list[PackedTensor], bytes, int]:
    """The tensor parts of an answer, the metadata of its first message, and bytes of all of them.

    An answer of ours says how many tensors it has; others end with the stream.
    """
    parts: list[PackedTensor] = []
    metadata: bytes | None = None
    count: int | None = None
    begun = missing = size = 0
    stream.max_frame = most
    try:
        while (message := await stream.receive()) is not None:
            # Every message counts, or one without anything could come for ever.
            stream.max_frame = max(0, stream.max_frame - stream.size - MESSAGE_BYTES)
            size += stream.size
            if metadata is None:
                metadata = message.metadata
                count = _tensor_count(metadata)
            for part in message.tensors:
                begun += bool(part.dtype)
                missing += part.chunks - 1 if part.dtype and part.chunks else -(not part.dtype)
            parts.extend(message.tensors)
            if begun == count and missing <= 0:
                break
    except streams.BadFrame as error:
        raise ServerFailed(f"server {stream.peer} sent no readable answer: {error}") from None
    return parts, metadata or b"", size


def _tensor_count(metadata: bytes) -> int | None:
    """How many tensors an answer says it has; None if it says nothing that can be read."""
    try:
        count = protocol.unpack_metadata(metadata).get(protocol.TENSORS)
    except BadRequest:
        return None
    return count if isinstance(count, int) else None
