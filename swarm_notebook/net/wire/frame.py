"""A large frame, put where it stays while it comes in.

The bytes of each tensor go to memory of their own, which the tensor then is made of (`tensors`);
all else is little, and is parsed by protobuf in the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hivemind.proto import runtime_pb2

from swarm_notebook.net.wire.format import SMALL_BYTES, FieldCheck
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor, parsed


@dataclass(slots=True)
class _Apart:
    """Bytes of a tensor that are kept apart: where their field is in the frame, and here."""

    key: int
    first: int
    last: int
    memory: memoryview


class Frame:
    """A message of ``length`` bytes with at most ``most`` fields, whose room has been taken."""

    def __init__(self, length: int, most: int):
        self._check = FieldCheck(length, most)
        self._small = bytearray()
        self._come = self._known = self._filled = 0
        self._apart: list[_Apart] = []
        self._of_tensor: dict[int, _Apart] = {}

    def feed(self, piece: bytes) -> None:
        """Take the next bytes.

        Raises:
            BadRequest: see `format.check_fields`.
        """
        self._check.feed(piece)
        self._find()
        view, begin = memoryview(piece), self._come
        self._come += len(piece)
        at = begin
        while at < self._come:
            apart = self._apart[self._filled] if self._filled < len(self._apart) else None
            if apart is None or at < apart.first:
                end = self._come if apart is None else min(self._come, apart.first)
                self._small += view[at - begin : end - begin]
            else:
                end = min(self._come, apart.last)
                apart.memory[at - apart.first : end - apart.first] = view[at - begin : end - begin]
                self._filled += end == apart.last
            at = end

    def _find(self) -> None:
        """Make room for the tensors whose beginning has come."""
        buffers = self._check.buffers
        for number, key, first, last in buffers[self._known :]:
            if last - first > SMALL_BYTES:
                # Not zeroed, and in huge pages where the system gives them to who asks: 16 MB
                # filled in pieces take 0.7 ms, a growing bytearray 36 to 75 (two shared cores).
                memory = np.empty(last - first, np.uint8).data
                self._of_tensor[number] = apart = _Apart(key, first, last, memory)
                self._apart.append(apart)
        self._known = len(buffers)

    def message(self) -> PackedMessage:
        """The message, when all has come.

        Raises:
            BadRequest: it is none.
        """
        rest, tensors = self._parts()
        found = parsed(runtime_pb2.ExpertRequest, rest)
        return PackedMessage(found.uid, tensors, found.metadata)

    def rest(self) -> bytes:
        """What is in no tensor."""
        return self._parts()[0]

    def _parts(self) -> tuple[bytes, list[PackedTensor]]:
        small, at, missing = memoryview(self._small), 0, 0
        rest: list[memoryview] = []
        tensors: list[PackedTensor] = []
        for number, (key, first, last) in enumerate(self._check.tensors):
            rest.append(small[at : key - missing])
            at, apart = first - missing, self._of_tensor.get(number)
            before = b""
            if apart is not None:
                before = bytes(small[at : apart.key - missing])
                at = apart.first - missing
                missing += apart.last - apart.first
            fields = before + small[at : last - missing]
            found = parsed(runtime_pb2.Tensor, fields)
            tensors.append(PackedTensor.of(found, None if apart is None else apart.memory))
            at = last - missing
        rest.append(small[at:])
        return b"".join(rest), tensors
