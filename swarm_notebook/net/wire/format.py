"""A look at the fields of a message before it is parsed, because parsing may take far more memory.

Two bytes are a tensor without anything in it, and a parsed tensor takes over seventy; a byte is a
size of a shape, and takes four, or forty as a Python integer. So fields are counted first, in the
bytes themselves: those of the message, those of each tensor, and the sizes of its shape. What is
let through takes no more than its own bytes again, and a little for every field.

A large message is looked at while it comes in (`FieldCheck`), so that one which is refused is not
waited for, nor kept.
"""

from __future__ import annotations

from swarm_notebook.errors import BadRequest

# An answer has the most: the states of all blocks and modules inside of them.
MAX_FIELDS = 8192
# Of a request: a name, metadata and eight tensors (`server.rpc.parse`), or parts of some.
MAX_REQUEST_FIELDS = 64
MAX_TENSOR_FIELDS = 32
# Six sizes, each of ten bytes at the most.
MAX_SIZE_BYTES = 64
# Below this, no message takes much.
SMALL_BYTES = 4096
# Of ``ExpertRequest`` and ``ExpertResponse``; and of ``Tensor``.
_TENSORS, _SIZE, _BUFFER = 2, 2, 1
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_FIXED = {_EIGHT: 8, _FOUR: 4}
# Seven bits each, of the 64 that a number has.
_MAX_VARINT = 10


def check_fields(data: bytes, most: int = MAX_FIELDS) -> None:
    """Refuse an ``ExpertRequest`` or ``ExpertResponse`` that would take much more than its bytes.

    Raises:
        BadRequest: it has more than ``most`` fields, or is no protobuf.
    """
    if len(data) > SMALL_BYTES:
        FieldCheck(len(data), most).feed(data)


class FieldCheck:
    """What `check_fields` does, for a message of ``length`` bytes that comes in pieces.

    Fields are walked through as far as they have come; of their contents nothing is kept.

    Attributes:
        tensors: where those are that have begun: the key, the content from its first byte to its
            end.
        buffers: the same of the bytes of tensors, behind the number of the tensor.
    """

    def __init__(self, length: int, most: int = MAX_FIELDS):
        self._length, self._most = length, most
        self._fields = self._tensor_fields = 0
        self._at = self._fed = 0  # where the next field begins, and how much has come
        self._tensor_end = 0  # of the tensor in which that is, if it is in one
        self._rest = b""  # the beginning of a field, cut
        self.tensors: list[tuple[int, int, int]] = []
        self.buffers: list[tuple[int, int, int, int]] = []

    def feed(self, piece: bytes) -> None:
        """Look at the next bytes.

        Raises: as `check_fields`.
        """
        data = self._rest + piece if self._rest else piece
        begin = self._fed - len(self._rest)
        self._fed += len(piece)
        while self._at < self._fed:
            found = _field(data, self._at - begin)
            if found is None:
                break
            self._enter(*found[:2], begin + found[2], begin + found[3])
        if self._fed == self._length and self._at != self._length:
            raise BadRequest("a field ends beyond its message")
        self._rest = data[self._at - begin :] if self._at < self._fed else b""

    def _enter(self, field: int, kind: int, first: int, last: int) -> None:
        """Count a field whose content goes from ``first`` to ``last``, and go on behind it."""
        inside = self._at < self._tensor_end
        if last > (self._tensor_end if inside else self._length):
            raise BadRequest("a field ends beyond its message")
        begin, self._at = self._at, last
        if inside:
            self._tensor_fields += 1
            long = field == _SIZE and last - first > MAX_SIZE_BYTES
            if self._tensor_fields > MAX_TENSOR_FIELDS or long:
                raise BadRequest("a tensor with more sizes or fields than any has")
            if field == _BUFFER and kind == _BYTES:
                number = len(self.tensors) - 1
                if self.buffers and self.buffers[-1][0] == number:
                    raise BadRequest("a tensor that has its bytes twice")
                self.buffers.append((number, begin, first, last))
            return
        self._fields += 1
        if self._fields > self._most:
            raise BadRequest(f"a message of more than {self._most} fields")
        if field == _TENSORS and kind == _BYTES:
            self._at, self._tensor_end, self._tensor_fields = first, last, 0
            self.tensors.append((begin, first, last))


def _field(data: bytes, at: int) -> tuple[int, int, int, int] | None:
    """Number, wire type and place of the content of a field; None if its beginning is cut."""
    key = _varint(data, at)
    if key is None:
        return None
    kind, first = key[0] & 7, key[1]
    if kind in _FIXED:
        return key[0] >> 3, kind, first, first + _FIXED[kind]
    if kind not in (_VARINT, _BYTES):
        raise BadRequest(f"a field of wire type {kind}, which no message here has")
    number = _varint(data, first)
    if number is None:
        return None
    if kind == _VARINT:
        return key[0] >> 3, kind, first, number[1]
    return key[0] >> 3, kind, number[1], number[1] + number[0]


def _varint(data: bytes, at: int) -> tuple[int, int] | None:
    """A number and where it ends; None if it is cut."""
    if at < len(data) and data[at] < 0x80:
        return data[at], at + 1
    value = 0
    for index, byte in enumerate(data[at : at + _MAX_VARINT]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    if len(data) - at >= _MAX_VARINT:
        raise BadRequest("a number in a message has no end")
    return None
