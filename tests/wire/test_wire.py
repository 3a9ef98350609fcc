"""A real server, spoken to on the wire: what works, and what hostile or confused peers get.

Every refused request is a typed error of its own stream. A bystander's session runs alongside all
of them and ends with exact results.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.p2p import P2PHandlerError
from support.patience import PATIENCE, within
from support.raw_wire import RawClient, RawSession, ServerProcess, request

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import BadRequest, CacheFull, SessionLost, from_wire
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.opening import open_stream
from swarm_notebook.server.engine.kv.cache import grown_capacity
from swarm_notebook.server.engine.span import Span

START, END, HIDDEN, CONTEXT = 1, 4, 48, 256
CACHE_TOKENS = 8192
PREFIX = "tiny-llama"
UID = protocol.uid_chain(PREFIX, START, END)


@dataclass
class Wire:
    """The server under test, a client, and the same blocks here to compare with.

    Attributes:
        held: tokens of the bystander, once there is one.
    """

    server: ServerProcess
    client: RawClient
    span: Span
    held: int = 0

    def run(self, work: Any) -> Any:
        return self.client.run(work)

    async def session(self) -> RawSession:
        return await self.client.session(self.server.peer)

    async def info(self, uid: str = "") -> dict[str, Any]:
        return await self.client.info(self.server.peer, uid)

    def local(self, hidden: torch.Tensor, start: int = START, end: int = END) -> torch.Tensor:
        return self.span.run(start, end, hidden)[0]

    async def free_tokens(self, expected: int, seconds: float = PATIENCE) -> int:
        """What the server says is free, once it is ``expected`` or after some seconds."""
        deadline = time.monotonic() + seconds
        while (free := (await self.info())["cache_tokens_free"]) != expected:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.02)
        return free

    async def all_free(self) -> int:
        """What is free once the sessions of earlier tests have ended, whichever these were."""
        free = CACHE_TOKENS - self.held
        assert await self.free_tokens(free) == free
        return free


class Bystander:
    """An honest session that goes on while others misbehave, and begins again near its end."""

    def __init__(self, session: RawSession, hidden: torch.Tensor, expected: torch.Tensor):
        self.session, self.hidden, self.expected = session, hidden, expected
        self.position = 0

    async def step(self, positions: int = 1) -> None:
        piece = slice(self.position, self.position + positions)
        (got,) = await self.session.step(
            UID, self.hidden[:, piece], max_length=CONTEXT, start_from_position=self.position
        )
        close(got, self.expected[:, piece])
        self.position = piece.stop if piece.stop < CONTEXT else CONTEXT // 2


@pytest.fixture(scope="module")
def wire(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    log = tmp_path_factory.mktemp("wire") / "server.log"
    options = ["--blocks", f"{START}:{END}", "--cache-tokens", str(CACHE_TOKENS)]
    server = ServerProcess(tiny_llama, log, *options)
    try:
        loaded = load_blocks(resolve(tiny_llama), START, END, dtype=torch.float32)
        server.wait_ready()
        client = RawClient(server.facts["maddrs"])
        yield Wire(server, client, Span(loaded.decoder, loaded.layers_name, START))
        client.close()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def bystander(wire: Wire) -> Iterator[Bystander]:
    """Steps with each test that uses it; its last step comes after all of them."""
    hidden = torch.randn(1, CONTEXT, HIDDEN)
    honest = Bystander(wire.run(wire.session()), hidden, wire.local(hidden))
    wire.held = CONTEXT
    wire.run(honest.step(CONTEXT))  # takes all the room that it will
    yield honest
    wire.run(honest.step())
    honest.session.close()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_info(wire: Wire) -> None:
    info = wire.run(wire.info(UID))
    assert info["cache_tokens_total"] == CACHE_TOKENS
    assert info[protocol.EXTENSION_KEY] == protocol.PROTOCOL_VERSION
    assert info["inference_schema"][0][0].size[-1] == HIDDEN
    assert "inference_schema" not in wire.run(wire.info())


def test_a_session_as_petals_clients_hold_it(wire: Wire) -> None:
    """Metadata, dummies and the closing empty request are Petals'."""
    hidden = torch.randn(2, 9, HIDDEN)

    async def work() -> torch.Tensor:
        session, got = await wire.session(), []
        common = {"session_id": "a", "points": 0.0, "active_adapter": None, "args_structure": None}
        for number, piece in enumerate((slice(0, 6), slice(6, 7), slice(7, 9))):
            first = {"max_length": 64, "alloc_timeout": 1.0} if number == 0 else {}
            slots = (hidden[:, piece], protocol.DUMMY, protocol.DUMMY_INT64)
            answer = await session.step(
                UID,
                *slots,
                **common,
                **first,
                step_id=str(number),
                start_from_position=piece.start,
                output_compression=(tensors.NONE,),
            )
            got.extend(answer)
        await session.stream.send(PackedMessage())
        assert await session.stream.receive() is None
        return torch.cat(got, dim=1)

    close(wire.run(work()), wire.local(hidden))
    wire.run(wire.all_free())


def test_our_extensions(wire: Wire) -> None:
    """States, some of the blocks only, rows that multiply, a uid that is left out."""
    hidden = torch.randn(2, 6, HIDDEN)
    middle, rows = wire.local(hidden, START, 2), [1, 0, 1]

    async def work() -> None:
        session = await wire.session()
        got = await session.step(UID, hidden[:, :5], states=[1, 3, 2])
        expected = [wire.local(hidden[:, :5], START, end) for end in (END, 2, 4, 3)]
        for mine, local in zip(got, expected, strict=True):
            close(mine, local)
        inner = protocol.uid_chain(PREFIX, 2, END)
        (got,) = await session.step(inner, middle[:, 3:5], start_from_position=3)
        close(got, wire.local(hidden)[:, 3:5])
        ids = torch.tensor(rows)
        (got,) = await session.step(UID, hidden[rows][:, 5:], None, ids, start_from_position=5)
        close(got, wire.local(hidden)[rows][:, 5:])
        (got,) = await session.step("", hidden[rows][:, 5:], start_from_position=5)
        close(got, wire.local(hidden)[rows][:, 5:])
        session.close()

    wire.run(work())


@pytest.mark.parametrize("last", [0, 2, 9])
def test_last_positions_only(wire: Wire, last: int) -> None:
    hidden = torch.randn(2, 6, HIDDEN)

    async def work() -> list[torch.Tensor]:
        session = await wire.session()
        got: list[torch.Tensor] = await session.step(UID, hidden, states=[2], last_positions=last)
        session.close()
        return got

    got, state = wire.run(work())
    close(got, wire.local(hidden)[:, max(6 - last, 0) :])
    close(state, wire.local(hidden, START, 3))


def test_a_repeated_step_is_dropped(wire: Wire) -> None:
    hidden = torch.randn(1, 2, HIDDEN)

    async def work() -> torch.Tensor:
        session = await wire.session()
        for step_id, piece in (("one", 0), ("one", 0), ("two", 1)):
            await session.stream.send(request(UID, hidden[:, piece : piece + 1], step_id=step_id))
        got = [*await session.receive(), *await session.receive()]
        session.close()
        return torch.cat(got, dim=1)

    close(wire.run(work()), wire.local(hidden))


def test_forward(wire: Wire) -> None:
    hidden = torch.randn(2, 7, HIDDEN)
    mask = torch.ones(2, 7, dtype=torch.uint8)
    mask[0, :3] = 0
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = wire.span.run(
        START, END, hidden, attention_mask=mask.long(), position_ids=positions
    )[0]
    message = request(UID, hidden, None, mask, positions, states=[2])
    split = [
        PackedMessage(uid=UID, tensors=[part], metadata=message.metadata)
        for tensor in message.tensors
        for part in tensors.split(tensor, 1000)
    ]
    peer = wire.server.peer
    for got in (
        wire.run(wire.client.forward(peer, message)),
        wire.run(wire.client.forward_stream(peer, split)),
    ):
        close(got[0][mask.bool()], expected[mask.bool()])
        assert got[1].shape == hidden.shape


def test_half_precision_travels(wire: Wire) -> None:
    hidden = torch.randn(1, 4, HIDDEN)
    message = request(UID, hidden.half(), output_compression=(tensors.FLOAT16,))
    (got,) = wire.run(wire.client.forward(wire.server.peer, message))
    torch.testing.assert_close(got, wire.local(hidden), atol=2e-2, rtol=0)


def test_an_answer_too_large_for_a_unary_call_is_refused(wire: Wire) -> None:
    message = request(UID, torch.randn(30, CONTEXT, HIDDEN), states=[1, 2, 3])
    with pytest.raises(P2PHandlerError, match=r"bad_request: .*use rpc_forward_stream"):
        wire.run(wire.client.forward(wire.server.peer, message))
    assert len(wire.run(wire.client.forward_stream(wire.server.peer, [message]))) == 4


def tensor(shape: list[int], dtype: str = "float32", **fields: Any) -> PackedTensor:
    return PackedTensor(size=tuple(shape), dtype=dtype, **fields)


def with_tensor(broken: PackedTensor) -> PackedMessage:
    return PackedMessage(uid=UID, tensors=[broken])


def with_hidden(*slots: torch.Tensor | None, **metadata: Any) -> PackedMessage:
    return request(UID, torch.randn(2, 3, HIDDEN), *slots, **metadata)


def spoilt(value: float) -> torch.Tensor:
    hidden = torch.randn(2, 3, HIDDEN)
    hidden[1, 2, 3] = value
    return hidden


GOOD = torch.zeros(2, 3, HIDDEN)
INTS = torch.zeros(2, 3, dtype=torch.int64)

# Wrong in any request.
WRONG: dict[str, tuple[PackedMessage, str]] = {
    "another model": (request("other.1", GOOD), "'other.1' is not of the form"),
    "no index": (request(f"{PREFIX}.x", GOOD), "is not of the form"),
    "negative index": (request(f"{PREFIX}.-1", GOOD), "is not of the form"),
    "not hosted": (request(f"{PREFIX}.0 {PREFIX}.1", GOOD), r"\[0, 2\) are not hosted"),
    "beyond the model": (request(f"{PREFIX}.99999999", GOOD), "are not hosted"),
    "with a hole": (request(f"{PREFIX}.1 {PREFIX}.3", GOOD), "not contiguous"),
    "backwards": (request(f"{PREFIX}.2 {PREFIX}.1", GOOD), "not contiguous"),
    "too many blocks": (request(" ".join([f"{PREFIX}.1"] * 5000), GOOD), "5000 blocks"),
    "no tensors": (PackedMessage(uid=UID), "0 tensors"),
    "many tensors": (with_hidden(*[GOOD] * 9), "10 tensors"),
    "a dummy": (request(UID, protocol.DUMMY), "hidden states: nothing"),
    "two dimensions": (request(UID, GOOD[0]), r"shape \[3, 48\]"),
    "hidden size": (request(UID, torch.zeros(1, 3, 32)), r"shape \[1, 3, 32\]"),
    "no rows": (request(UID, torch.zeros(0, 3, HIDDEN)), "0 rows"),
    "many rows": (request(UID, torch.zeros(5000, 1, HIDDEN)), "5000 rows"),
    "integers": (request(UID, GOOD.long()), "expected floating point"),
    "NaN": (request(UID, spoilt(float("nan"))), "NaN or infinite"),
    "infinite": (request(UID, spoilt(float("-inf"))), "NaN or infinite"),
    "dtype": (with_tensor(tensor([1, 1, HIDDEN], "complex64")), "'complex64' is not one of"),
    "short buffer": (with_tensor(tensor([1, 1, HIDDEN], buffer=b"1")), "its buffer has 1"),
    "huge shape": (with_tensor(tensor([1 << 31, 1 << 31, 1 << 31])), "its buffer has 0"),
    "no elements": (with_tensor(tensor([0, 1 << 31, 1 << 31])), "hidden states|tensor"),
    "compression": (
        with_tensor(tensor([1, 1, HIDDEN], compression=7, buffer=b"1" * 192)),
        "compression 7",
    ),
    "eight dimensions": (with_tensor(tensor([1] * 8, buffer=b"1234")), "8 dimensions"),
    "prompts": (with_hidden(torch.zeros(2, 2, 1, HIDDEN)), r"expected \[3, 1 or 2"),
    "NaN in prompts": (with_hidden(torch.full((3, 1, 1, HIDDEN), float("nan"))), "prompts: .*NaN"),
    "no msgpack": (PackedMessage(uid=UID, metadata=b"\xc1\xc1"), "metadata"),
    # hivemind's descriptor of a tensor, without a single field
    "no descriptor": (
        PackedMessage(uid=UID, metadata=b"\x81\xa1x\xc7\x01\x51\x80"),
        "metadata is not msgpack",
    ),
    "a list": (
        PackedMessage(uid=UID, metadata=protocol.pack_metadata([1])),
        "expected a dict",
    ),
    "states": (with_hidden(states=[0]), "states: "),
    "states of text": (with_hidden(states="12"), "states: "),
    "many states": (with_hidden(states=[1] * 4), "states: "),
    "output compression": (with_hidden(output_compression=(7,)), "output_compression"),
    "adapter": (with_hidden(active_adapter="x"), "active_adapter: 'x'"),
}
# Wrong in a session's step, where hypo_ids stand before the mask and the positions.
WRONG_STEPS: dict[str, tuple[PackedMessage, str]] = {
    "no blocks": (request("", GOOD), "is not of the form"),
    "negative position": (with_hidden(start_from_position=-1), "start_from_position: '-1'"),
    "position ahead": (with_hidden(start_from_position=1), "holds only 0"),
    "huge position": (with_hidden(start_from_position=1 << 62), "start_from_position"),
    "position of text": (with_hidden(start_from_position="0"), "start_from_position"),
    "true position": (with_hidden(start_from_position=True), "start_from_position"),
    "huge length": (with_hidden(max_length=1 << 40), "max_length"),
    "negative length": (with_hidden(max_length=-5), "max_length"),
    "patience": (with_hidden(alloc_timeout=float("nan")), "alloc_timeout"),
    "negative patience": (with_hidden(alloc_timeout=-1.0), "alloc_timeout"),
    "long step id": (with_hidden(step_id="x" * 300), "step_id"),
    "context": (request(UID, torch.zeros(1, CONTEXT + 1, HIDDEN)), "the model has 256"),
    "long prompts": (with_hidden(torch.zeros(3, 1, CONTEXT + 1, HIDDEN)), "up to 256"),
    "fractions of rows": (with_hidden(None, torch.zeros(2)), "hypo_ids: torch.float32"),
    "rows of another number": (with_hidden(None, torch.zeros(3).long()), "hypo_ids: "),
    "negative row": (with_hidden(None, torch.tensor([0, -1])), "row -1 does not exist"),
    "mask shape": (with_hidden(None, None, INTS[:, :2]), "attention mask: "),
    "mask dtype": (with_hidden(None, None, INTS.float()), "attention mask: "),
    "mask values": (with_hidden(None, None, INTS + 2), "neither 0 nor 1"),
    "positions shape": (with_hidden(None, None, None, INTS[0]), "position ids: "),
    "positions dtype": (with_hidden(None, None, None, INTS.half()), "position ids: "),
    "huge positions": (with_hidden(None, None, None, INTS + (1 << 40)), "position ids: "),
    "negative positions": (with_hidden(None, None, None, INTS - 2), "position ids: "),
}
WRONG_FORWARDS: dict[str, tuple[PackedMessage, str]] = {
    "long prompts": (with_hidden(torch.zeros(3, 1, 4, HIDDEN)), "up to 3"),
    "mask shape": (with_hidden(None, INTS[:1]), "attention mask: "),
    "positions": (with_hidden(None, None, INTS[:, :1]), "position ids: "),
    "context": (request(UID, torch.zeros(1, CONTEXT + 1, HIDDEN)), "the model has 256"),
    "batch": (request(UID, torch.zeros(64, 200, HIDDEN)), f"at most {CACHE_TOKENS}"),
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_STEPS])
def test_wrong_steps_are_refused(wire: Wire, bystander: Bystander, name: str) -> None:
    message, expected = {**WRONG, **WRONG_STEPS}[name]

    async def work() -> None:
        session = await wire.session()
        await session.stream.send(message)
        await bystander.step()
        with pytest.raises(BadRequest, match=expected):
            await session.receive()
        assert (await wire.info())["sessions"] == 1  # the bystander's
        session.close()

    wire.run(work())


@pytest.mark.parametrize("name", [*WRONG, *WRONG_FORWARDS])
def test_wrong_passes_are_refused(wire: Wire, bystander: Bystander, name: str) -> None:
    message, expected = {**WRONG, **WRONG_FORWARDS}[name]
    peer = wire.server.peer
    with pytest.raises(BadRequest, match=expected):
        wire.run(wire.client.forward_stream(peer, [message]))
    if message.size < protocol.MAX_UNARY_BYTES:
        with pytest.raises(P2PHandlerError) as caught:
            wire.run(wire.client.forward(peer, message))
        assert isinstance(from_wire(str(caught.value), "test"), BadRequest), caught.value
    wire.run(bystander.step())


@pytest.mark.parametrize("uid", ["x", f"{PREFIX}.0", f"{PREFIX}.1 {PREFIX}.3", " "])
def test_info_of_unknown_blocks_is_refused(wire: Wire, uid: str) -> None:
    with pytest.raises(P2PHandlerError, match="bad_request: "):
        wire.run(wire.info(uid))


GARBAGE = {
    "noise": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "truncated protobuf": b"\x00" + (3).to_bytes(8, "big") + b"\x0a\xff\xff",
    "no protobuf": b"\x00" + (9).to_bytes(8, "big") + b"\xff" * 9,
    "huge length": b"\x00" + (1 << 60).to_bytes(8, "big"),
    "negative length": b"\x00" + b"\xff" * 8,
    "frame above the limit": b"\x00" + (1 << 29).to_bytes(8, "big"),
}


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize("rpc", [protocol.RPC_INFERENCE, protocol.RPC_FORWARD_STREAM])
def test_garbage_is_refused(wire: Wire, bystander: Bystander, rpc: str, name: str) -> None:
    async def work() -> None:
        session = RawSession(await open_stream(wire.client.node.p2p, wire.server.peer, rpc))
        await session.send_bytes(GARBAGE[name])
        await bystander.step()
        with pytest.raises(BadRequest):
            await session.receive()

    wire.run(work())


def test_truncated_protobufs_in_unary_calls_are_refused(wire: Wire) -> None:
    for rpc in (protocol.RPC_INFO, protocol.RPC_FORWARD):
        call = wire.client.node.p2p._client.call_unary_handler(wire.server.peer, rpc, b"\x0a\xff")
        with pytest.raises(P2PHandlerError, match="bad_request: "):
            wire.run(call)


def test_a_frame_that_never_ends_harms_nobody(wire: Wire, bystander: Bystander) -> None:
    async def work() -> None:
        session = await wire.session()
        await session.send_bytes(b"\x00" + (1 << 20).to_bytes(8, "big") + b"\x00" * 1000)
        await bystander.step()
        session.close()

    wire.run(work())


def test_a_second_wrong_step_ends_a_good_session(wire: Wire, bystander: Bystander) -> None:
    hidden = torch.randn(2, 3, HIDDEN)
    later = {
        "hypo_ids: row 2": {"slots": [None, torch.tensor([0, 2])]},
        "holds only 3": {"metadata": {"start_from_position": 4}},
        "1 rows, the session has 2": {"hidden": hidden[:1]},
        "the model has 256": {"hidden": torch.randn(2, CONTEXT - 2, HIDDEN)},
    }

    async def work(expected: str, second: dict[str, Any]) -> None:
        session = await wire.session()
        await session.step(UID, hidden)
        slots = [second.get("hidden", hidden), *second.get("slots", [])]
        with pytest.raises(BadRequest, match=expected):
            await session.step(UID, *slots, **second.get("metadata", {}))
        await bystander.step()

    for expected, second in later.items():
        wire.run(work(expected, second))


def test_cache_that_is_too_small_is_refused_at_once(wire: Wire) -> None:
    async def work() -> None:
        session, reason = await wire.session(), f"needs 12800 cache tokens .* {CACHE_TOKENS}"
        with within(5), pytest.raises(CacheFull, match=reason):
            await session.step(UID, torch.zeros(64, 200, HIDDEN), alloc_timeout=60.0)

    wire.run(work())


def test_a_full_cache_is_waited_for_and_idle_sessions_give_way(
    wire: Wire, bystander: Bystander
) -> None:
    rows = CACHE_TOKENS // CONTEXT - 2

    async def refuse() -> None:
        session = await wire.session()
        with pytest.raises(CacheFull, match=r"asked for 5120 .* of 8192 are free"):
            await session.step(UID, torch.zeros(32, 160, HIDDEN), alloc_timeout=0.2)

    async def work() -> None:
        free = await wire.all_free()
        big = await wire.session()
        await big.step(UID, torch.zeros(rows, 160, HIDDEN))
        left = free - rows * grown_capacity(0, 160)
        assert await wire.free_tokens(left) == left
        await refuse()
        patient = await wire.session()
        hidden = torch.randn(32, 160, HIDDEN)
        await patient.stream.send(request(UID, hidden, alloc_timeout=60.0))
        await asyncio.sleep(0.3)
        big.close()
        (got,) = await patient.receive()
        close(got[:1], wire.local(hidden[:1]))
        impatient = await wire.session()
        await impatient.stream.send(request(UID, hidden, alloc_timeout=2.1))
        answer = asyncio.ensure_future(impatient.receive())
        while not answer.done():
            await bystander.step()  # is not idle, and keeps its memory
            await asyncio.sleep(0.2)
        (got,) = await answer
        close(got[:1], wire.local(hidden[:1]))
        with pytest.raises(SessionLost, match="idle"):
            await patient.receive()
        impatient.close()
        await wire.all_free()

    wire.run(work())


@pytest.mark.parametrize("ending", ["broken stream", "end frame"])
def test_a_client_that_leaves_in_mid_step_frees_its_memory(wire: Wire, ending: str) -> None:
    async def work() -> None:
        free = await wire.all_free()
        session = await wire.session()
        await session.stream.send(request(UID, torch.randn(20, CONTEXT, HIDDEN)))
        assert await wire.free_tokens(free - 20 * CONTEXT) == free - 20 * CONTEXT
        if ending == "end frame":
            await session.stream.send_end()
        else:
            session.close()
        await wire.all_free()
        session.close()

    wire.run(work())


def test_sessions_side_by_side_are_exact(wire: Wire) -> None:
    async def client(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(1 + seed % 2, 20 + seed, HIDDEN, generator=generator)
        expected = wire.local(hidden)
        session, begin = await wire.session(), 0
        while begin < hidden.shape[1]:
            end = begin + (7 if begin == 0 else 1)
            (got,) = await session.step(UID, hidden[:, begin:end], start_from_position=begin)
            close(got, expected[:, begin:end])
            begin = end
        session.close()

    async def work() -> None:
        await asyncio.gather(*(client(seed) for seed in range(6)))

    wire.run(work())


def test_the_server_is_none_the_worse(wire: Wire) -> None:
    """After all of the above, nothing has failed inside."""
    log = wire.server.log.read_text()
    assert "Traceback" not in log, log
