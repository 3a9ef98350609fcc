"""Whatever comes from the network is read, or refused by an error of ours, in little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import peft.tuners  # noqa: F401 (what is not imported is no class)
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import seeded, values
from torch import nn

from swarm_notebook.errors import BadRequest, RemoteError, from_wire
from swarm_notebook.net.dht.records import parse_model_record, parse_record
from swarm_notebook.net.wire import protocol, streams, tensors
from swarm_notebook.net.wire.format import (
    MAX_FIELDS,
    MAX_REQUEST_FIELDS,
    SMALL_BYTES,
    FieldCheck,
    check_fields,
)
from swarm_notebook.net.wire.frame import Frame
from swarm_notebook.net.wire.message import MAX_DIMENSIONS, PackedMessage, PackedTensor
from swarm_notebook.server.adapters.file import parse_safetensors
from swarm_notebook.server.adapters.layers import Builder, parse_description
from swarm_notebook.server.engine.requests import Limits
from swarm_notebook.server.rpc.parse import parse_backward, parse_forward, parse_step

fuzz = seeded(150)
LIMITS = Limits("tiny", 1, 4, hidden_size=8, context=64, tokens=256)
FIELDS = [
    "states", "inner", "adapter", "active_adapter", "train", "seed", "keep", "kept", "release",
    "output_compression", "start_from_position", "step_id", "session_id", "alloc_timeout",
    "max_length", "push_to", "push_from", "next_servers", "rotary_length",
]  # fmt: skip
metadata = st.dictionaries(st.sampled_from(FIELDS), values, max_size=5)
dtypes = st.sampled_from([*tensors._DTYPES, "", "complex64", "qint8"])
sizes = st.lists(
    st.sampled_from([0, 1, 2, 3, 8, 16, 2**31 - 1, 2**32 - 1]), max_size=MAX_DIMENSIONS
).map(tuple)


@st.composite
def fitting(draw: st.DrawFn) -> PackedTensor:
    """A tensor as it should be, of some shape and dtype; its values are anything."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8]), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bfloat16]))
    value = draw(st.sampled_from([0.0, 1.0, -1.0, 1e9]))
    packed = tensors.pack(torch.full(shape, int(value) % 256, dtype=dtype))
    packed.compression = draw(st.sampled_from([0, 0, 0, tensors.FLOAT16, tensors.INT8, 3]))
    return packed


any_tensor = fitting() | st.builds(
    PackedTensor,
    buffer=st.binary(max_size=64),
    size=sizes,
    dtype=dtypes,
    compression=st.sampled_from([0, 1, 2, 3, 4, 5, tensors.INT8]),
    chunks=st.integers(-2, 5),
)


def framed(data: bytes, cuts: Sequence[int] = ()) -> Frame:
    """The bytes as a large frame that came in pieces."""
    frame = Frame(len(data), MAX_FIELDS)
    for begin, end in pairwise([0, *sorted(cuts), len(data)]):
        frame.feed(data[begin:end])
    return frame


def read(work: Callable[[], Any]) -> None:
    """What is refused is refused by an error that may travel, whose text is bounded."""
    try:
        work()
    except RemoteError as error:
        text = str(error)
    else:
        return
    assert len(text) < 2000


@fuzz
@given(st.binary(max_size=200))
def test_bytes(data: bytes) -> None:
    read(lambda: check_fields(data))
    read(lambda: PackedMessage.of(data))
    for read_frame in (streams._read_message, streams._read_error):
        read(lambda read_frame=read_frame: read_frame(framed(data)))
    read(lambda: protocol.unpack_metadata(data))
    read(lambda: parse_safetensors(torch.frombuffer(bytearray(data + b"."), dtype=torch.uint8)))
    from_wire(data.decode("latin-1"), "a peer")


@fuzz
@given(any_tensor)
def test_a_tensor(packed: PackedTensor) -> None:
    read(lambda: tensors.unpack(packed))
    read(lambda: tensors.is_file(packed))


@fuzz
@given(st.lists(any_tensor, max_size=5))
def test_parts_of_tensors(parts: list[PackedTensor]) -> None:
    read(lambda: tensors.join(parts))


@fuzz
@given(st.lists(any_tensor, max_size=9), metadata, st.text(max_size=30) | st.just("tiny.1 tiny.2"))
def test_requests(packed: list[PackedTensor], named: dict[str, Any], uid: str) -> None:
    hidden = tensors.pack(torch.zeros(2, 3, 8))
    for slots in (packed, [hidden, *packed]):
        for parse in (parse_forward, parse_backward):
            read(lambda parse=parse, slots=slots: parse(uid, slots, named, LIMITS))
        message = PackedMessage(uid=uid, tensors=slots, metadata=protocol.pack_metadata(named))
        read(lambda message=message: parse_step(message, (1, 4), LIMITS))


@fuzz
@given(values, values)
def test_records(found: Any, more: Any) -> None:
    for record in (found, (2, 1.0, found), (2, 1.0, {"public_name": found, "next_pings": more})):
        parse_record(record)
        parse_model_record(record)


LAYER = "peft.tuners.lora.layer.Linear"


@fuzz
@given(values, values)
def test_descriptions_of_adapters(found: Any, more: Any) -> None:
    one = {"layers": found, "tensors": more, "trained": found}
    for described in (found, {"blocks": found}, {"peft": "1.0", "blocks": {"1": one}}):
        text = json.dumps(described, default=str, skipkeys=True).encode("utf-8", "replace")
        read(lambda text=text: parse_description(text, (1, 4), {}, "1.0"))
    named = json.loads(json.dumps([found, more], default=str, skipkeys=True))
    for layer in (
        named[0],
        {"class": LAYER, "attributes": named[0], "modules": named[1]},
        {"class": LAYER, "attributes": {"r": named[0]}, "buffers": named[1]},
    ):
        block = nn.Sequential(nn.Linear(2, 2))
        builder = Builder(block, "block 1", {}, frozenset())
        read(lambda builder=builder, layer=layer: builder.build({"0": layer}))


SMALL_PARTS = {
    "empty tensors": (b"\x12\x00" * (1 << 20), "more than 8192 fields"),
    "sizes": (
        PackedMessage(tensors=[PackedTensor(size=(7,) * (1 << 20))]).to_bytes(),
        "more sizes or fields",
    ),
}


@pytest.mark.parametrize("name", SMALL_PARTS)
def test_small_parts_do_not_take_large_memory(name: str) -> None:
    """Without a look at them, 2 MiB of empty tensors take over a hundred."""
    data, what = SMALL_PARTS[name]
    tracemalloc.start()
    with pytest.raises(BadRequest, match=what):
        check_fields(data)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # What other threads of the process take meanwhile counts, too.
    assert taken < 8 << 20


@fuzz
@given(st.lists(fitting(), max_size=6), st.binary(max_size=3 * SMALL_BYTES))
def test_what_is_let_through_is_what_parses(packed: list[Any], more: bytes) -> None:
    message = PackedMessage(uid="tiny.1", tensors=packed, metadata=bytes(SMALL_BYTES) + more)
    check_fields(message.to_bytes())


def refused(data: bytes, cuts: list[int]) -> bool:
    """Whether a message is refused that comes in pieces."""
    check = FieldCheck(len(data))
    try:
        for begin, end in pairwise([0, *sorted(cuts), len(data)]):
            check.feed(data[begin:end])
    except BadRequest:
        return True
    return False


@fuzz
@given(st.lists(fitting(), max_size=6), st.data())
def test_in_pieces_a_message_is_what_it_is_as_a_whole(packed: list[Any], data: Any) -> None:
    message = bytearray(PackedMessage(uid="tiny.1", tensors=packed, metadata=b"m").to_bytes())
    places = st.integers(0, len(message) - 1)
    for place in data.draw(st.lists(places, max_size=2)):
        message[place] = data.draw(st.integers(0, 255))
    cuts = data.draw(st.lists(places, max_size=8))
    assert refused(bytes(message), cuts) == refused(bytes(message), [])


def test_what_is_to_be_refused_is_refused_before_it_is_there() -> None:
    """Of a frame of 64 MiB the first piece is enough."""
    check = FieldCheck(64 << 20, MAX_REQUEST_FIELDS)
    with pytest.raises(BadRequest, match="more than 64 fields"):
        check.feed(b"\x12\x00" * (MAX_REQUEST_FIELDS + 1))
