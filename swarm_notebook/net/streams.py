"""Protobuf messages over one long-lived libp2p stream, in hivemind's framing.

A frame is one byte (0 message, 1 error), eight bytes big-endian length, and the protobuf. An error
frame with a text is a failure (see `errors.to_wire`). The two directions end differently, as
hivemind has it: who asks sends an error frame with an empty `RPCError`; who answers ends its half
of the stream (end of file), and never sends an empty error frame, which hivemind's clients take
for a failure. We frame by ourselves over hivemind's binary streams, instead of its
async-generator handlers, because a decode step is one message each way: no task and no queue per
message, a bound on the length that a peer may declare, and typed errors.

In a private swarm the first message of a stream is a request without tensors, whose metadata show
who asks; what else comes is read only if that is a member (see `net.membership`).

A frame that has begun must come to its end in time, and so must whoever reads it. On a server its
bytes are taken from `traffic` first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.proto import runtime_pb2
from hivemind.proto.p2pd_pb2 import RPCError

from swarm_notebook.errors import (
    BadRequest,
    NotAMember,
    RemoteError,
    ServerBusy,
    from_wire,
    to_wire,
)
from swarm_notebook.net import protocol
from swarm_notebook.net.membership.certificate import Membership, Role
from swarm_notebook.net.traffic import COPIES, Account, Traffic
from swarm_notebook.net.wire_format import check_fields

logger = logging.getLogger(__name__)

# 32,768 tokens of a hidden size of 8,192 in float32, which is a prompt in one message.
MAX_FRAME_BYTES = 1 << 30
# How long a peer may not read before it is given up: it may be swapped out, or far behind.
UNHEARD_SECONDS = 20.0
# An honest peer closes within a round trip; each that does not holds one stream for so long.
LINGER_SECONDS = 10.0
# Many times what an answer that is on its way takes from one daemon to the other.
END_SECONDS = 0.25
# Beyond it, who has lingered longest goes: it has had most time to read its error.
MAX_LINGERING = 256
# A frame that has begun, and an answer, must get on: so many seconds, and more if they are large,
# at the rate of the slowest links on which a notebook is of any use.
STALLED_SECONDS = 20.0
SLOWEST_BYTES = 64 << 10  # per second
# What a stream takes by itself: a task or two, its buffers, its answers to rubbish.
STREAM_BYTES = 64 << 10
# Where nobody counts: on a notebook's side, whose servers may answer what they were asked for.
UNLIMITED = 1 << 60
# What a member shows takes 200 bytes.
MAX_SHOWN_BYTES = 512
_HEADER_BYTES = 9
_MESSAGE, _ERROR = 0, 1
# Below this a frame is written as one piece: one system call instead of two.
_JOIN_BYTES = 1 << 16

# What opening or using a stream raises when the peer, the daemon or the way there fails.
TRANSPORT_ERRORS = (P2PDaemonError, P2PHandlerError, ControlFailure, OSError, TimeoutError)

M = TypeVar("M", bound=Message)

_serving: set[asyncio.Task[None]] = set()


class StreamClosed(ConnectionError):
    """The other side is gone: the stream ended in the middle or between two frames."""


class BadFrame(BadRequest):
    """What came in is not a frame with a message of the expected kind."""


@dataclass(slots=True)
class ByteMeter:
    """Bytes that went over streams, frames and all."""

    sent: int = 0
    received: int = 0


class Stream:
    """One direction-pair of frames with ``peer`` (its base58 id, for messages).

    Args:
        answers: what comes in are answers, which end with the file.
        account: where what comes in is counted; its owner gives back what has gone.

    Attributes:
        max_frame: how long a frame may be; of an answer, as long as what was asked for.
        arriving: bytes that ``account`` holds for the frame that is being read.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer: str,
        max_frame: int = MAX_FRAME_BYTES,
        meter: ByteMeter | None = None,
        *,
        answers: bool = False,
        account: Account | None = None,
    ):
        self._reader, self._writer = reader, writer
        self.peer, self.max_frame = peer, max_frame
        self.account = account or Traffic(UNLIMITED, UNLIMITED).open(peer)
        self.arriving = 0
        self._meter = meter or ByteMeter()
        self._answers, self._answered = answers, False

    async def send(self, message: Message) -> None:
        """Write one message and wait until the buffer has room again."""
        self._write(_MESSAGE, message.SerializeToString())
        await self._drain()

    async def answer(self, message: Message, seconds: float) -> None:
        """`send` to a peer that has so many seconds to read, and more if there is much.

        Raises:
            StreamClosed: it did not, or others needed the memory.
        """
        size = message.ByteSize()
        try:
            if size < _JOIN_BYTES:
                async with asyncio.timeout(seconds):
                    await self.send(message)
            else:
                async with self.account.waiting_for_peer(seconds + size / SLOWEST_BYTES):
                    await self.send(message)
        except (TimeoutError, ServerBusy):
            self.abort()
            raise StreamClosed(f"peer {self.peer} does not read its answers") from None

    async def send_end(self) -> None:
        """Tell who answers that nothing more is asked."""
        self._write(_ERROR, b"")
        await self._drain()

    async def end_answers(self) -> None:
        """Tell who asks that nothing more comes, unless it has closed the stream before.

        At the end of the file p2pd closes both halves, and may reset the stream; on busy machines
        answers were seen to get lost then. So whoever knows without it that the answer is whole
        (see `protocol.TENSORS`) has a moment to close the stream, and hivemind's clients, which do
        not, a moment to read.
        """
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(END_SECONDS):
                while await self._reader.read(_JOIN_BYTES):
                    pass
                return
        if not self._writer.is_closing():
            self._writer.write_eof()

    async def send_error(self, error: BaseException) -> None:
        """Tell the other side why this stream ends."""
        self._write(_ERROR, RPCError(message=to_wire(error)).SerializeToString())
        await self._drain()

    async def receive(self, kind: type[M]) -> M | None:
        """The next message, or None when the other side has said its last.

        Answers may end with the file, after one of them at least.

        Raises:
            StreamClosed: the other side is gone.
            BadFrame: the bytes are no frame or no message, are too many, or do not get on.
            ServerBusy: there is no memory for them.
            RemoteError: the other side sent an error frame.
        """
        try:
            header = await self._reader.readexactly(_HEADER_BYTES)
            marker, length = header[0], int.from_bytes(header[1:], "big")
            if marker not in (_MESSAGE, _ERROR):
                raise BadFrame(f"a frame begins with byte {marker}, expected 0 or 1")
            if length > self.max_frame:
                raise BadFrame(f"a frame of {length} bytes, at most {self.max_frame} are read")
            data = await self._body(length)
            self._meter.received += _HEADER_BYTES + length
        except asyncio.IncompleteReadError as error:
            if self._answered and not error.partial and not self._writer.is_closing():
                return None
            raise StreamClosed(f"peer {self.peer} closed the stream") from error
        except ConnectionError as error:
            raise StreamClosed(f"peer {self.peer} closed the stream") from error
        self.arriving = 0
        if marker == _MESSAGE:
            self._answered = self._answers
            return _parse(kind, data)
        failure = _parse(RPCError, data)
        if not failure.message:
            return None
        raise from_wire(failure.message, self.peer)

    async def _body(self, length: int) -> bytes:
        """The bytes of a frame, which are counted before they are read."""
        self.arriving = await self.account.take(COPIES * length)
        try:
            if length < _JOIN_BYTES:
                async with asyncio.timeout(STALLED_SECONDS):
                    return await self._reader.readexactly(length)
            seconds = STALLED_SECONDS + length / SLOWEST_BYTES
            async with self.account.waiting_for_peer(seconds):
                return await self._reader.readexactly(length)
        except TimeoutError:
            raise BadFrame(f"a frame of {length} bytes did not come to its end in time") from None

    def close(self) -> None:
        """End this direction after what is still in the buffer."""
        self._writer.close()

    async def linger(self) -> None:
        """Wait until the other side has closed the stream, and ignore what it still says."""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(LINGER_SECONDS):
                while await self._reader.read(_JOIN_BYTES):
                    pass

    def abort(self) -> None:
        """End both directions now; a peer that reads no more cannot hold this up."""
        self._writer.transport.abort()

    def _write(self, marker: int, data: bytes) -> None:
        # asyncio's loop would drop what is written to a stream that is closed, uvloop's raises.
        if self._writer.is_closing():
            raise StreamClosed(f"peer {self.peer} closed the stream")
        self._meter.sent += _HEADER_BYTES + len(data)
        header = bytes((marker,)) + len(data).to_bytes(8, "big")
        if len(data) < _JOIN_BYTES:
            self._writer.write(header + data)
        else:
            self._writer.write(header)
            self._writer.write(data)

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise StreamClosed(f"peer {self.peer} closed the stream") from error


def _parse(kind: type[M], data: bytes) -> M:
    try:
        check_fields(data)
        return kind.FromString(data)
    except BadRequest as error:
        raise BadFrame(str(error)) from None
    except DecodeError as error:
        raise BadFrame(f"{len(data)} bytes are no {kind.__name__}: {error}") from None


async def open_stream(
    p2p: P2P,
    peer: PeerID,
    handler: str,
    meter: ByteMeter | None = None,
    max_frame: int = MAX_FRAME_BYTES,
    *,
    membership: Membership | None = None,
) -> Stream:
    """A new stream to `handler` of `peer`; P2PDaemonError when the peer cannot be reached.

    Args:
        membership: shown to the peer; a round trip more is not needed for it.
    """
    opening = asyncio.ensure_future(p2p.call_binary_stream_handler(peer, handler))
    try:
        _, reader, writer = await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_abandon)
        raise
    stream = Stream(reader, writer, peer.to_base58(), max_frame, meter, answers=True)
    if membership is not None:
        try:
            await stream.send(runtime_pb2.ExpertRequest(metadata=show(membership)))
        except BaseException:
            stream.abort()
            raise
    return stream


def show(membership: Membership) -> bytes:
    """The metadata by which a member shows that it is one."""
    return protocol.pack_metadata({protocol.MEMBER: membership.shown})


def _abandon(opening: asyncio.Future) -> None:
    """End a stream that nobody waits for any more; cancelling would leave it half open for good."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[2].transport.abort()


async def add_stream_handler(
    p2p: P2P,
    name: str,
    handler: Callable[[Stream, PeerID], Awaitable[None]],
    max_frame: int = MAX_FRAME_BYTES,
    traffic: Traffic | None = None,
    *,
    membership: Membership | None = None,
    role: Role = Role.NOTEBOOK,
) -> None:
    """Serve `name`: `handler` runs once per stream; what it raises travels as an error frame.

    When it returns, the answers end. After an error the peer may still be sending, and p2pd, which
    closes both halves at once, would reset the stream: a reset overtakes what has not been read
    yet, the error. So the stream stays until the peer has closed it, for a while and for so many
    peers.

    Args:
        traffic: what all streams may hold together; each has an account, closed in the end.
        membership: of a private swarm, whose members alone are heard, in this ``role`` at least.
    """
    traffic = traffic or Traffic(UNLIMITED, UNLIMITED)
    price = stream_price(traffic.total)
    lingering: deque[Stream] = deque()

    async def on_stream(
        info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        # Held, because uvloop holds neither a task that waits for its stream nor the stream: both
        # would be freed as a circle that nobody knows.
        if (task := asyncio.current_task()) is not None:
            _serving.add(task)
            task.add_done_callback(_serving.discard)
        peer = info.peer_id.to_base58()
        base, account = traffic.open(peer), traffic.open(peer)
        stream = Stream(reader, writer, peer, max_frame, account=account)
        try:
            if not base.try_take(price):
                await _tell(stream, ServerBusy("too many streams are open here; close some"))
            elif await _guarded(stream, _admit(stream, info.peer_id, handler, membership, role)):
                await stream.end_answers()
            account.close()
            base.close()
            if len(lingering) >= MAX_LINGERING:
                lingering.popleft().close()
            lingering.append(stream)
            try:
                await stream.linger()
            finally:
                with contextlib.suppress(ValueError):
                    lingering.remove(stream)
        except StreamClosed:
            logger.debug("%s: peer %s left", name, stream.peer)
        finally:
            account.close()
            base.close()
            stream.close()

    await p2p.add_binary_stream_handler(name, on_stream)


def stream_price(total: int) -> int:
    """What each stream takes of ``total`` bytes, so that they leave half of the descriptors."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors <= 0 or total >= UNLIMITED:
        return STREAM_BYTES
    return max(STREAM_BYTES, 2 * total // descriptors)


async def _admit(
    stream: Stream,
    peer: PeerID,
    handler: Callable[[Stream, PeerID], Awaitable[None]],
    membership: Membership | None,
    role: Role,
) -> None:
    """Run a handler; in a private swarm for members only, and as long as they are members."""
    if membership is None:
        await handler(stream, peer)
        return
    certificate = membership.check(stream.peer, await _shown(stream), role)
    with membership.holding(certificate, stream.abort):
        await handler(stream, peer)


async def _shown(stream: Stream) -> object:
    """What a peer shows of itself in its first message; nothing else is read of a stranger."""
    limit, stream.max_frame = stream.max_frame, MAX_SHOWN_BYTES
    try:
        async with asyncio.timeout(UNHEARD_SECONDS):
            message = await stream.receive(runtime_pb2.ExpertRequest)
    except BadFrame:
        return None
    except TimeoutError:
        raise NotAMember("this swarm is private, and nothing was shown in time") from None
    finally:
        stream.max_frame = limit
    stream.account.resize(0)
    return shown_in(message.metadata) if message is not None else None


def shown_in(metadata: bytes) -> object:
    """What a peer shows in the metadata of a message."""
    try:
        return protocol.unpack_metadata(metadata).get(protocol.MEMBER)
    except BadRequest:
        return None


async def _guarded(stream: Stream, work: Awaitable[None]) -> bool:
    """Run a handler; what it raises is logged and sent to the peer. Whether it raised nothing."""
    try:
        await work
    except StreamClosed:
        raise
    except RemoteError as error:
        logger.info("refused a request of %s: %s", stream.peer, error)
        await _tell(stream, error)
    except Exception as error:
        logger.exception("a request of %s failed", stream.peer)
        await _tell(stream, error)
    else:
        return True
    return False


async def _tell(stream: Stream, error: Exception) -> None:
    """Send an error; a peer that does not read cannot keep the stream for that."""
    try:
        async with asyncio.timeout(UNHEARD_SECONDS):
            await stream.send_error(error)
    except TimeoutError:
        stream.abort()
        raise StreamClosed(f"peer {stream.peer} does not read") from None
