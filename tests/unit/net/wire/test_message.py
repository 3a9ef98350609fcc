"""Messages without copies are those of hivemind, and what is received belongs to who unpacks it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hivemind.compression import deserialize_torch_tensor
from hivemind.proto import runtime_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import tensors
from swarm_notebook.net.wire.format import MAX_FIELDS
from swarm_notebook.net.wire.frame import Frame
from swarm_notebook.net.wire.message import LARGE_BYTES, PackedMessage, PackedTensor, varint

fuzz = settings(max_examples=60, derandomize=True, deadline=None, database=None)
# Bytes below and above where they are kept apart and sent by reference, at odd places besides.
elements = st.sampled_from([0, 1, 127, 1025, 40_001])
dtypes = st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64])


@st.composite
def messages(draw: st.DrawFn) -> tuple[PackedMessage, list[torch.Tensor]]:
    given = [
        torch.arange(count).remainder(97).to(draw(dtypes)).reshape(1, count, 1)
        for count in draw(st.lists(elements, max_size=4))
    ]
    uid = draw(st.sampled_from(["", "a.1", "a.1 " * 2000]))
    metadata = bytes(draw(st.sampled_from([0, 3, 70_000])))
    return PackedMessage(uid, [tensors.pack(tensor) for tensor in given], metadata), given


def in_pieces(data: bytes, cuts: list[int]) -> PackedMessage:
    frame = Frame(len(data), MAX_FIELDS)
    for begin, end in pairwise([0, *sorted(cuts), len(data)]):
        frame.feed(data[begin:end])
    return frame.message()


@fuzz
@given(messages(), st.data())
def test_a_message_is_the_bytes_that_protobuf_writes(
    made: tuple[PackedMessage, list[torch.Tensor]], data: Any
) -> None:
    message, sent = made
    written = message.to_bytes()
    assert message.size == len(written)
    theirs = runtime_pb2.ExpertRequest.FromString(written)
    assert theirs.SerializeToString() == written
    assert (theirs.uid, theirs.metadata) == (message.uid, message.metadata)
    places = st.integers(0, len(written))
    ours = [PackedMessage.of(written), in_pieces(written, data.draw(st.lists(places, max_size=6)))]
    for found in ours:
        assert (found.uid, found.metadata) == (message.uid, message.metadata)
        got = [tensors.unpack(tensor) for tensor in found.tensors]
        for tensor, other, protobuf in zip(got, sent, theirs.tensors, strict=True):
            assert tensor.dtype == other.dtype
            assert torch.equal(tensor, other)
            if tensor.dtype in (torch.float32, torch.int64):
                assert torch.equal(deserialize_torch_tensor(protobuf), other)


def test_what_is_large_is_not_copied() -> None:
    hidden = torch.randn(1, 300, 64)
    packed = tensors.pack(hidden)
    pieces = PackedMessage("a.1", [packed], b"m").pieces()
    assert [len(piece) >= LARGE_BYTES for piece in pieces] == [False, True, False]
    hidden[0, 0, 0] = 5.0
    assert bytes(pieces[1]) == hidden.numpy().tobytes()
    # Whoever unpacks what is to be sent gets a copy: what is sent stays as it is.
    tensors.unpack(packed).zero_()
    assert float(hidden[0, 0, 0]) == 5.0

    (found,) = in_pieces(b"".join(pieces), [1, 100, 7000]).tensors
    got = tensors.unpack(found)
    assert torch.equal(got, hidden)
    got[0, 0, 0] = 7.0
    assert float(tensors.unpack(found)[0, 0, 0]) == 7.0
    assert got.data_ptr() % 16 == 0


def test_what_is_small_or_not_in_one_piece_is_copied() -> None:
    small, whole = torch.zeros(4), torch.zeros(2, 400, 64)
    for tensor in (small, whole[:, 1:]):
        packed = tensors.pack(tensor)
        tensor.fill_(1.0)
        assert not tensors.unpack(packed).any()


def test_a_tensor_that_has_its_bytes_twice() -> None:
    once = b"\x0a\x88\x27" + bytes(5000)
    tensor = once + once + b"\x12\x01\x05\x22\x05uint8"
    data = b"\x12" + varint(len(tensor)) + tensor
    with pytest.raises(BadRequest, match="its bytes twice"):
        in_pieces(data, [])


def test_more_dimensions_than_any_tensor_has() -> None:
    tensor = runtime_pb2.Tensor(size=[1] * 8, dtype="float32", buffer=bytes(4))
    written = runtime_pb2.ExpertRequest(tensors=[tensor]).SerializeToString()
    with pytest.raises(BadRequest, match="8 dimensions"):
        PackedMessage.of(written)
    assert PackedTensor.of(runtime_pb2.Tensor(size=[2, 0])).size == (2, 0)
