"""Messages as they are on the wire, without a copy of what is large in them.

On the wire a message is hivemind's ``ExpertRequest`` or ``ExpertResponse`` (proto/runtime.proto),
which have the same fields with the same numbers but for the ``uid``, that only requests have. Here
it is a `PackedMessage`, and a tensor in it a `PackedTensor`, whose bytes protobuf does not touch:
protobuf would copy them whenever they are put in, taken out, written or read, and 16 MB (a prompt
of 2,048 positions of an 8B model in bfloat16) take 8 to 25 ms to copy into fresh memory, measured
in a virtual machine with an H200. `PackedMessage.pieces` are the very bytes that protobuf writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from hivemind.proto import runtime_pb2

from swarm_notebook.errors import BadRequest

# Deep prompts have most: blocks, batch, length, hidden.
MAX_DIMENSIONS = 6
# From here on a tensor's bytes are written from where they are: less is copied in the time that a
# further system call takes.
LARGE_BYTES = 1 << 16

Buffer = bytes | memoryview
M = TypeVar("M", bound=Message)

# Keys of fields: their number and that a length follows.
_UID, _TENSOR, _METADATA, _BUFFER = b"\x0a", b"\x12", b"\x1a", b"\x0a"


@dataclass(slots=True, eq=False)
class PackedTensor:
    """A tensor on the wire, or a part of one (`tensors.split`).

    Attributes:
        buffer: its bytes. A view is of somebody's memory: of the tensor that is sent, which nobody
            may write to until it has left, or of what was received, which belongs to who unpacks.
        size: its shape.
        dtype: the name of its dtype; empty for the second part and those behind it.
        compression: one of `tensors`.
        chunks: how many parts it has.
    """

    buffer: Buffer = b""
    size: tuple[int, ...] = ()
    dtype: str = ""
    compression: int = 0
    chunks: int = 0

    @property
    def header(self) -> bytes:
        """By what its bytes are read: the same bytes are other values in another dtype."""
        return f"{self.dtype} {self.compression} {[*self.size]}".encode()

    @classmethod
    def of(cls, found: runtime_pb2.Tensor, buffer: Buffer | None = None) -> PackedTensor:
        """The same as a protobuf.

        Args:
            buffer: its bytes, if they are not in the protobuf.

        Raises:
            BadRequest: it has more dimensions than any tensor here.
        """
        dimensions = len(found.size)
        if dimensions > MAX_DIMENSIONS:
            raise BadRequest(
                f"a tensor has {dimensions} dimensions, at most {MAX_DIMENSIONS} are read"
            )
        return cls(
            found.buffer if buffer is None else buffer,
            tuple(found.size),
            found.dtype,
            found.compression,
            found.chunks,
        )


@dataclass(slots=True, eq=False)
class PackedMessage:
    """A request, or an answer, which has no ``uid``."""

    uid: str = ""
    tensors: list[PackedTensor] = field(default_factory=list)
    metadata: bytes = b""

    @classmethod
    def of(cls, data: bytes) -> PackedMessage:
        """The message in bytes that are not many.

        Raises:
            BadRequest: they are none.
        """
        found = parsed(runtime_pb2.ExpertRequest, data)
        return cls(found.uid, [PackedTensor.of(tensor) for tensor in found.tensors], found.metadata)

    def pieces(self) -> list[Buffer]:
        """The bytes on the wire, in pieces; those of large tensors by reference."""
        whole: list[Buffer] = []
        small: list[Buffer] = []
        if self.uid:
            uid = self.uid.encode()
            small += [_UID, varint(len(uid)), uid]
        for tensor in self.tensors:
            length = len(tensor.buffer)
            head = _BUFFER + varint(length) if length else b""
            rest = _fields(tensor.size, tensor.dtype, tensor.compression, tensor.chunks)
            small += [_TENSOR, varint(len(head) + length + len(rest)), head]
            if length < LARGE_BYTES:
                small.append(tensor.buffer)
            else:
                whole += [b"".join(small), tensor.buffer]
                small.clear()
            small.append(rest)
        if self.metadata:
            small += [_METADATA, varint(len(self.metadata)), self.metadata]
        return [*whole, b"".join(small)]

    @property
    def size(self) -> int:
        """How many bytes it has on the wire."""
        return total_bytes(self.pieces())

    def to_bytes(self) -> bytes:
        """`pieces` in one, for calls that are no streams."""
        return b"".join(self.pieces())


def total_bytes(pieces: Iterable[Buffer]) -> int:
    """How many bytes these are together."""
    return sum(map(len, pieces))


def parsed(kind: type[M], data: bytes) -> M:
    """A protobuf of a kind.

    Raises:
        BadRequest: the bytes are none.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise BadRequest(f"{len(data)} bytes are no {kind.__name__}: {error}") from None


@lru_cache(maxsize=256)
def _fields(size: tuple[int, ...], dtype: str, compression: int, chunks: int) -> bytes:
    """A tensor on the wire but for its bytes: the same for all tokens of a session."""
    tensor = runtime_pb2.Tensor(size=size, dtype=dtype, compression=compression, chunks=chunks)
    return tensor.SerializeToString()


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    if number < 0x80:
        return bytes((number,))
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)
