"""Protobuf messages over one long-lived libp2p stream, in hivemind's framing.

A frame is one byte (0 message, 1 error), eight bytes big-endian length, and the protobuf. An error
frame with a text is a failure (see `errors.to_wire`). The two directions end differently, as
hivemind has it: who asks sends an error frame with an empty `RPCError`; who answers ends its half
of the stream (end of file), and never sends an empty error frame, which hivemind's clients take
for a failure. We frame by ourselves over hivemind's binary streams, instead of its
async-generator handlers, because a decode step is one message each way: no task and no queue per
message, a bound on the length that a peer may declare, and typed errors.

A frame that has begun must come to its end in time, and so must whoever reads it. Its bytes are
taken from `traffic` first, and looked at as they come: nothing is waited for that is to be refused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from hivemind.p2p import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.proto.p2pd_pb2 import RPCError

from swarm_notebook.errors import BadRequest, ServerBusy, from_wire, to_wire
from swarm_notebook.net.wire.format import MAX_FIELDS, check_fields
from swarm_notebook.net.wire.frame import Frame
from swarm_notebook.net.wire.message import (
    LARGE_BYTES,
    Buffer,
    PackedMessage,
    parsed,
    total_bytes,
)
from swarm_notebook.net.wire.traffic import COPIES, Account, Traffic

# 32,768 tokens of a hidden size of 8,192 in float32, which is a prompt in one message.
MAX_FRAME_BYTES = 1 << 30
# An honest peer closes within a round trip; each that does not holds one stream for so long.
LINGER_SECONDS = 10.0
# Many times what an answer that is on its way takes from one daemon to the other.
END_SECONDS = 0.25
# A frame that has begun, and an answer, must get on: so many seconds, and more if they are large,
# at the rate of the slowest links on which a notebook is of any use.
STALLED_SECONDS = 20.0
SLOWEST_BYTES = 64 << 10  # per second
# Where nobody counts: on a notebook's side, whose servers may answer what they were asked for.
UNLIMITED = 1 << 60
_HEADER_BYTES = 9
_MESSAGE, _ERROR = 0, 1
# Below this a frame is written and read as one piece: one system call instead of two.
_JOIN_BYTES = LARGE_BYTES
# As much as uvloop reads at once.
_READ_BYTES = 1 << 18

# What opening or using a stream raises when the peer, the daemon or the way there fails; a daemon
# that ends while it is asked something leaves an answer incomplete.
TRANSPORT_ERRORS = (
    P2PDaemonError,
    P2PHandlerError,
    ControlFailure,
    OSError,
    TimeoutError,
    asyncio.IncompleteReadError,
)


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
        max_fields: how many fields a message may have.
        account: where what comes in is counted; its owner gives back what has gone.

    Attributes:
        max_frame: how long a frame may be; of an answer, as long as what was asked for.
        arriving: bytes that ``account`` holds for the frame that is being read.
        size: bytes of the message that was received last. To ask the message would cost as much as
            to pack it again.
        unanswered: bytes that came since a message was sent last.
        sent: how many messages were sent.
    """

    peer: str
    max_frame: int
    arriving: int
    size: int
    unanswered: int
    sent: int

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer: str,
        max_frame: int = MAX_FRAME_BYTES,
        meter: ByteMeter | None = None,
        *,
        answers: bool = False,
        max_fields: int = MAX_FIELDS,
        account: Account | None = None,
    ):
        self._reader, self._writer = reader, writer
        self.peer, self.max_frame = peer, max_frame
        self.account: Account = account or Traffic(UNLIMITED, UNLIMITED).open(peer)
        self.arriving = self.size = self.unanswered = self.sent = 0
        self._max_fields = max_fields
        self._meter = meter or ByteMeter()
        self._answers, self._answered, self._receiving = answers, False, False

    def send_at_once(self, message: PackedMessage) -> bool:
        """Write a small message if nothing waits before it; whether that was so.

        Whoever sends a message per answer needs no more: no wait, and so nothing that bounds it.
        """
        if self._writer.is_closing() or self._writer.transport.get_write_buffer_size():
            return False
        pieces = message.pieces()
        if total_bytes(pieces) >= _JOIN_BYTES:
            return False
        self._write(_MESSAGE, pieces)
        return True

    async def send(self, message: PackedMessage) -> None:
        """Write one message and wait until the buffer has room again.

        What is large of it is not copied: the last of it may be read a little later.
        """
        await self._send(message.pieces())

    async def answer(self, message: PackedMessage, seconds: float) -> None:
        """`send` to a peer that has so many seconds to read, and more if there is much.

        Raises:
            StreamClosed: it did not, or others needed the memory.
        """
        if self.send_at_once(message):
            return
        pieces = message.pieces()
        size = total_bytes(pieces)
        try:
            if size < _JOIN_BYTES:
                async with asyncio.timeout(seconds):
                    await self._send(pieces)
            else:
                async with self.account.waiting_for_peer(seconds + size / SLOWEST_BYTES):
                    await self._send(pieces)
        except (TimeoutError, ServerBusy):
            self.abort()
            raise StreamClosed(f"peer {self.peer} does not read its answers") from None

    async def send_end(self) -> None:
        """Tell who answers that nothing more is asked."""
        self._write(_ERROR, [])
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
        self._write(_ERROR, [RPCError(message=to_wire(error)).SerializeToString()])
        await self._drain()

    async def receive(self) -> PackedMessage | None:
        """The next message, or None when the other side has said its last.

        Answers may end with the file, after one of them at least.

        Raises:
            StreamClosed: the other side is gone.
            BadFrame: the bytes are no frame or no message, are too many, or do not get on.
            ServerBusy: there is no memory for them.
            RemoteError: the other side sent an error frame.
        """
        self._receiving = True
        try:
            header = await self._reader.readexactly(_HEADER_BYTES)
            marker, length = header[0], int.from_bytes(header[1:], "big")
            if marker not in (_MESSAGE, _ERROR):
                raise BadFrame(f"a frame begins with byte {marker}, expected 0 or 1")
            if length > self.max_frame:
                raise BadFrame(f"a frame of {length} bytes, at most {self.max_frame} are read")
            data = await self._body(length)
        except asyncio.IncompleteReadError as error:
            if self._answered and not error.partial and not self._writer.is_closing():
                return None
            raise StreamClosed(_closed(self.peer)) from error
        except ConnectionError as error:
            raise StreamClosed(_closed(self.peer)) from error
        finally:
            self._receiving = False
        self.arriving = 0
        if marker == _MESSAGE:
            self._answered, self.size = self._answers, length
            return _read_message(data)
        failure = _read_error(data)
        if not failure:
            return None
        raise from_wire(failure, self.peer)

    async def _body(self, length: int) -> bytes | Frame:
        """The bytes of a frame, which are counted before they are read."""
        self.arriving = await self.account.take(COPIES * length)
        try:
            return await self._read(length)
        except BaseException:
            self.account.resize(max(0, self.account.held - self.arriving))
            self.arriving = 0
            raise

    async def _read(self, length: int) -> bytes | Frame:
        try:
            if length < _JOIN_BYTES:
                if self._has_come(length):
                    data = await self._reader.readexactly(length)
                else:
                    async with asyncio.timeout(STALLED_SECONDS):
                        data = await self._reader.readexactly(length)
                self._came(_HEADER_BYTES + length)
                check_fields(data, self._max_fields)
                return data
            seconds = STALLED_SECONDS + length / SLOWEST_BYTES
            async with self.account.waiting_for_peer(seconds):
                return await self._pieces(length)
        except TimeoutError:
            raise BadFrame(f"a frame of {length} bytes did not come to its end in time") from None
        except BadRequest as error:
            raise BadFrame(str(error)) from None

    async def _pieces(self, length: int) -> Frame:
        frame, missing = Frame(length, self._max_fields), length
        self._came(_HEADER_BYTES)
        while missing:
            piece = await self._reader.read(min(missing, _READ_BYTES))
            if not piece:
                raise StreamClosed(_closed(self.peer))
            self._came(len(piece))
            frame.feed(piece)
            missing -= len(piece)
        return frame

    def _has_come(self, length: int) -> bool:
        """Whether so many bytes can be read without a wait, which would need a timer."""
        reader: Any = self._reader  # asyncio tells it to nobody else
        return len(reader._buffer) >= length

    def _came(self, size: int) -> None:
        self._meter.received += size
        self.unanswered += size

    def close(self) -> None:
        """End this direction after what is still in the buffer."""
        self._writer.close()

    async def linger(self, discarded: Callable[[str, int], Awaitable[None]]) -> None:
        """Wait until the other side has closed the stream, and ignore what it still says.

        Args:
            discarded: told the peer and how many bytes it said; waits until it may say more.
        """
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(LINGER_SECONDS):
                while piece := await self._reader.read(_JOIN_BYTES):
                    await discarded(self.peer, len(piece))

    def abort(self) -> None:
        """End both directions now; a peer that reads no more cannot hold this up."""
        self._writer.transport.abort()

    async def _send(self, pieces: list[Buffer]) -> None:
        try:
            self._write(_MESSAGE, pieces)
            await self._drain()
        except StreamClosed:
            await self._hear_out()
            raise

    async def _hear_out(self) -> None:
        """Raise why the other side has ended the stream, if it has said so before."""
        if not self._answers or self._receiving:
            return  # whoever receives hears it
        with contextlib.suppress(TimeoutError, StreamClosed, BadFrame):
            async with asyncio.timeout(END_SECONDS):
                while await self.receive() is not None:
                    pass

    def _write(self, marker: int, pieces: list[Buffer]) -> None:
        # asyncio's loop would drop what is written to a stream that is closed, uvloop's raises.
        if self._writer.is_closing():
            raise StreamClosed(_closed(self.peer))
        size = total_bytes(pieces)
        if marker == _MESSAGE:
            self.unanswered, self.sent = 0, self.sent + 1
        self._meter.sent += _HEADER_BYTES + size
        header = bytes((marker,)) + size.to_bytes(8, "big")
        if size < _JOIN_BYTES:
            self._writer.write(b"".join((header, *pieces)))
        else:
            self._writer.writelines([header, *pieces])

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise StreamClosed(_closed(self.peer)) from error


def _closed(peer: str) -> str:
    return f"peer {peer} closed the stream without a reason: it has ended, or is flooded"


def _read_message(data: bytes | Frame) -> PackedMessage:
    try:
        return data.message() if isinstance(data, Frame) else PackedMessage.of(data)
    except BadRequest as error:
        raise BadFrame(str(error)) from None


def _read_error(data: bytes | Frame) -> str:
    try:
        return parsed(RPCError, data.rest() if isinstance(data, Frame) else data).message
    except BadRequest as error:
        raise BadFrame(str(error)) from None
