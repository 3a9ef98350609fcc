"""A look at the fields of a message before it is parsed, because parsing may take far more memory.

Two bytes are a tensor without anything in it, and a parsed tensor takes over seventy; a byte is a
size of a shape, and takes four, or forty as a Python integer. So fields are counted first, in the
bytes themselves: those of the message, those of each tensor, and the sizes of its shape. What is
let through takes no more than its own bytes again, and a little for every field.
"""

from __future__ import annotations

from collections.abc import Iterator

from swarm_notebook.errors import BadRequest

# An answer has the most: the states of all blocks and modules inside of them.
MAX_FIELDS = 8192
MAX_TENSOR_FIELDS = 32
# Six sizes, each of ten bytes at the most.
MAX_SIZE_BYTES = 64
# Below this, no message takes much.
SMALL_BYTES = 4096
# Of ``ExpertRequest`` and ``ExpertResponse``; and of ``Tensor``.
_TENSORS, _SIZE = 2, 2
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


def check_fields(data: bytes) -> None:
    """Refuse an ``ExpertRequest`` or ``ExpertResponse`` that would take much more than its bytes.

    Raises:
        BadRequest: it has too many fields, or is no protobuf.
    """
    if len(data) <= SMALL_BYTES:
        return
    for count, (field, kind, begin, end) in enumerate(_fields(data, 0, len(data))):
        if count >= MAX_FIELDS:
            raise BadRequest(f"a message of more than {MAX_FIELDS} fields")
        if field == _TENSORS and kind == _BYTES:
            _check_tensor(data, begin, end)


def _check_tensor(data: bytes, begin: int, end: int) -> None:
    for count, (field, _, first, last) in enumerate(_fields(data, begin, end)):
        if count >= MAX_TENSOR_FIELDS or (field == _SIZE and last - first > MAX_SIZE_BYTES):
            raise BadRequest("a tensor with more sizes or fields than any has")


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type and place of the content of every field."""
    while at < end:
        key, at = _varint(data, at, end)
        kind, begin = key & 7, at
        if kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind == _BYTES:
            length, begin = _varint(data, at, end)
            at = begin + length
        elif kind in (_EIGHT, _FOUR):
            at += 8 if kind == _EIGHT else 4
        else:
            raise BadRequest(f"a field of wire type {kind}, which no message here has")
        if at > end:
            raise BadRequest("a field ends beyond its message")
        yield key >> 3, kind, begin, at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise BadRequest("a number in a message has no end")
