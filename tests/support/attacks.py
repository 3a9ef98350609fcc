"""What a stranger may try against a server, byte by byte; each attack is a coroutine.

An attack opens what it needs, holds it for a while and lets go. It returns the errors that the
server sent, so that a test can see how it was refused. `make hostile` runs them all on real
processes, tests in `tests/wire` run some in small.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from hivemind.p2p import PeerID
from support.attacking import (
    BARE,
    RPCS,
    Attack,
    Errors,
    Target,
    again,
    deadline,
    hold,
    many,
)

from swarm_notebook.errors import SwarmError
from swarm_notebook.net.dht.records import ServerInfo, ServerState
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire import protocol, streams, tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.stream_server import add_stream_handler


async def _open_many(target: Target, count: int, rpc: str, first: bytes) -> Errors:
    opened: list[streams.Stream] = []

    async def one(_: int) -> None:
        stream = await target.open(rpc)
        opened.append(stream)
        stream._writer.write(first)

    return await many(count, one) + await hold(target, opened)


async def slowloris(target: Target, count: int = 2000) -> Errors:
    """Streams that begin a frame and never go on."""
    return await _open_many(
        target, count, protocol.RPC_FORWARD_STREAM, b"\x00" + bytes(7) + b"\xff"
    )


async def push_streams(target: Target, count: int = 1300) -> Errors:
    """More streams than a process may have open files."""
    return await _open_many(target, count, protocol.RPC_PUSH_STREAM, b"")


async def sessions_of_one_id(target: Target, count: int = 1000) -> Errors:
    opened: list[streams.Stream] = []
    hidden = torch.zeros(1, 1, target.hidden)

    async def one(_: int) -> None:
        stream = await target.open(protocol.RPC_INFERENCE)
        try:
            await stream.send(target.request(hidden, session_id="the same", max_length=8))
            await stream.receive()
        except Exception:
            stream.abort()
            raise
        opened.append(stream)

    return await many(count, one) + await hold(target, opened)


async def malformed(target: Target, count: int = 35) -> Errors:
    """Requests in which something is wrong, over and over."""
    hidden = torch.zeros(1, 2, target.hidden)
    wrong = [
        dict.fromkeys(("states", "inner", "adapter", "push_to"), value)
        for value in (-1, "x", [[]], {"a": b"\xff"}, 1e400)
    ]

    async def one(_: int) -> None:
        async with target.asking(target.random.choice(RPCS[2:])) as stream:
            slot = target.random.choice([hidden, hidden[..., 1:], hidden.to(torch.int64), None])
            metadata = target.random.choice(wrong)
            await stream.send(target.request(slot, None, slot, **metadata))
            await stream.send_end()
            await stream.receive()

    return await again(target, lambda: many(count, one, at_once=8))


async def ask_honestly(target: Target) -> PackedMessage | None:
    """A pass of two tokens, as anybody may ask for."""
    async with target.asking(protocol.RPC_FORWARD_STREAM) as stream:
        await stream.send(target.request(torch.zeros(1, 2, target.hidden)))
        await stream.send_end()
        return await stream.receive()


async def new_identities(target: Target) -> Errors:
    """What is free for each peer, from one new peer after the other."""

    async def attack() -> Errors:
        node = await Node.start([target.address], client=True)
        try:
            return await malformed(replace(target, node=node, seconds=0.0), 64)
        finally:
            await node.stop()

    return await again(target, attack)


async def unannounced_pushes(target: Target, count: int = 21200) -> Errors:
    opened = [await target.open(protocol.RPC_PUSH_STREAM) for _ in range(4)]
    tensor = tensors.pack(torch.zeros(1, 32, target.hidden))
    with contextlib.suppress(*BARE):
        for number in range(count):
            metadata = protocol.pack_metadata({"session_id": "none", "step_id": str(number)})
            await opened[number % 4].send(PackedMessage(tensors=[tensor], metadata=metadata))
    return await hold(target, opened)


async def made_up_peers(target: Target, count: int = 200) -> Errors:
    """Records of servers that do not exist and are faster than any that does."""
    boast = ServerInfo(
        state=ServerState.ONLINE,
        throughput=1e9,
        inference_rps=1e9,
        start_block=target.blocks[0],
        end_block=target.blocks[1],
        swarm_notebook=protocol.PROTOCOL_VERSION,
    ).to_record()
    keys = [protocol.block_uid(target.prefix, index) for index in range(*target.blocks)]
    for _ in range(count):
        peer = PeerID(b"\x12\x20" + target.random.randbytes(32)).to_base58()
        await target.node.dht.store_many(
            keys, [boast] * len(keys), time.time() + 120, subkeys=[peer] * len(keys)
        )
    await asyncio.sleep(target.seconds)
    return []


async def narrow_rows(target: Target, count: int = 16) -> Errors:
    """8-bit values in rows of one: forty times their bytes if they were unpacked; over and over."""
    values = (48 << 20) // 3
    tensor = PackedTensor(
        buffer=bytes(3 * values), size=(values, 1), dtype="float64", compression=tensors.INT8
    )
    small = (target.frame - 4096) // 3
    fits = PackedTensor(
        buffer=bytes(3 * small), size=(small, 1), dtype="float64", compression=tensors.INT8
    )
    slots = [tensor if number % 4 == 0 else fits for number in range(count)]
    return await again(target, lambda: _ask(target, slots))


async def _ask(target: Target, slots: Sequence[PackedTensor]) -> Errors:
    async def one(number: int) -> None:
        async with target.asking(RPCS[number % 2 * 2]) as stream:
            sending = asyncio.create_task(send(stream, number))
            try:
                await stream.receive()  # a refusal comes before all is sent
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def send(stream: streams.Stream, number: int) -> None:
        await stream.send(PackedMessage(uid=target.uid, tensors=[slots[number]]))
        if number % 2:  # a session that is ended is owed no answer
            await stream.send_end()

    return await many(len(slots), one, at_once=8)


async def empty_tensors(target: Target, count: int = 8) -> Errors:
    """Two bytes each, and over seventy when they are parsed; over and over."""
    data = b"\x12\x00" * ((target.frame - 9) // 2)
    frame = b"\x00" + len(data).to_bytes(8, "big") + data

    async def attack() -> Errors:
        opened = [await target.open(RPCS[number % 4]) for number in range(count)]
        for stream in opened:
            stream._writer.write(frame)
        return await hold(target, opened)

    return await again(target, attack)


async def unfinished(target: Target, count: int = 8) -> Errors:
    """Every kind of request, all but its last byte."""
    opened = [await target.open(RPCS[number % 4]) for number in range(count)]
    header = b"\x00" + target.frame.to_bytes(8, "big")
    for stream in opened:
        stream._writer.write(header + bytes(target.frame - 1))
    return await hold(target, opened)


async def unread_answers(target: Target, count: int = 16) -> Errors:
    """Large answers to small requests, of which nothing is read."""
    hidden = torch.zeros(1, target.tokens, target.hidden)
    opened = [await target.open(protocol.RPC_FORWARD_STREAM) for _ in range(count)]
    packed = tensors.pack(hidden, tensors.INT8)
    states = list(range(*target.blocks))
    message = PackedMessage(
        uid=target.uid, tensors=[packed], metadata=protocol.pack_metadata({"states": states})
    )
    for stream in opened:
        stream._reader._transport.pause_reading()
        with contextlib.suppress(*BARE):
            await stream.send(message)
            await stream.send_end()
    await asyncio.sleep(target.seconds)
    for stream in opened:
        stream.abort()
    return []


async def long_passes(target: Target, at_once: int = 2) -> Errors:
    """The longest passes forward and back that the server takes, two at a time."""
    hidden, until = torch.randn(1, target.tokens, target.hidden), deadline(target)
    kinds = [(protocol.RPC_FORWARD_STREAM, [hidden]), (protocol.RPC_BACKWARD_STREAM, [hidden] * 2)]

    async def one(number: int) -> None:
        rpc, slots = kinds[number % 2]
        while time.monotonic() < until:
            async with target.asking(rpc) as stream:
                for slot in slots:
                    await stream.send(target.request(slot))
                await stream.send_end()
                async with asyncio.timeout(max(0.1, until - time.monotonic())):
                    while await stream.receive() is not None:
                        pass

    return await many(at_once, one)


async def long_prompts(target: Target, at_once: int = 2) -> Errors:
    """Sessions with nothing but a prompt, one after the other, two at a time.

    Together they have half of the cache, so that there is room for others.
    """
    length = target.tokens // (2 * at_once)
    hidden, until = torch.randn(1, length, target.hidden), deadline(target)

    async def one(number: int) -> None:
        while time.monotonic() < until:
            async with target.asking(protocol.RPC_INFERENCE) as stream:
                await stream.send(
                    target.request(hidden, session_id=f"long {number}", max_length=length)
                )
                async with asyncio.timeout(max(0.1, until - time.monotonic())):
                    await stream.receive()

    return await many(at_once, one)


async def full_cache(target: Target, at_once: int = 64) -> Errors:
    """Sessions that fill the cache, with steps in flight all the time; what is lost is begun anew.

    A step repeats the last positions of its session, so that it goes on for ever.
    """
    # A cache has room for an eighth more than was asked for, in pages.
    length, until, errors = target.tokens // at_once * 7 // 8, deadline(target), Errors()
    prompt, token = torch.randn(1, length, target.hidden), torch.randn(1, 1, target.hidden)

    async def go_on(stream: streams.Stream, number: int) -> None:
        await stream.send(target.request(prompt, session_id=f"full {number}", max_length=length))
        for _ in range(2):
            await stream.send(target.request(token, start_from_position=length - 1))
        while time.monotonic() < until:
            await stream.receive()
            await stream.send(target.request(token, start_from_position=length - 1))

    async def one(number: int) -> None:
        while time.monotonic() < until:
            async with target.asking(protocol.RPC_INFERENCE) as stream:
                try:
                    async with asyncio.timeout(max(0.1, until - time.monotonic())):
                        await go_on(stream, number)
                except (SwarmError, *BARE) as error:
                    errors.append(error)

    return await many(at_once, one, at_once) + errors


async def inner_modules(target: Target, at_once: int = 8) -> Errors:
    """Outputs of all modules inside of the blocks, of a pass that is as long as can be."""
    names = ["mlp", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "self_attn"]
    inner = [[block, name] for block in range(*target.blocks) for name in names]
    rows = target.tokens // 256
    hidden = torch.zeros(rows, 256, target.hidden)

    async def one(_: int) -> None:
        async with target.asking(protocol.RPC_FORWARD_STREAM) as stream:
            await stream.send(target.request(hidden, inner=inner))
            await stream.send_end()
            async with asyncio.timeout(target.seconds):
                await stream.receive()
            await asyncio.sleep(target.seconds)

    return await many(at_once, one)


async def push_to_a_drip(target: Target, address: str) -> Errors:
    """Steps that the server pushes to a peer of the attacker's, which sends half a frame back."""
    evil = await Node.start([address], client=False)

    async def drip(stream: streams.Stream, _peer: PeerID) -> None:
        stream._writer.write(b"\x00" + (1 << 29).to_bytes(8, "big"))
        with contextlib.suppress(*BARE):
            while True:
                stream._writer.write(bytes(1 << 20))
                await stream._writer.drain()

    await add_stream_handler(evil.p2p, protocol.RPC_PUSH_STREAM, drip)
    try:
        stream = await target.open(protocol.RPC_INFERENCE)
        hidden = torch.zeros(1, 1, target.hidden)
        for number in range(3):
            to = [evil.peer_id.to_base58(), "any"]
            message = target.request(
                hidden, session_id="mine", step_id=str(number), max_length=8, push_to=to
            )
            await stream.send(message)
            await stream.receive()
        await asyncio.sleep(target.seconds)
        stream.abort()
    finally:
        await evil.stop()
    return []


ATTACKS: dict[str, Attack] = {
    "slowloris, 2,000 streams": slowloris,
    "1,300 push streams, 1,024 files": push_streams,
    "1,000 sessions of one id": sessions_of_one_id,
    "35 malformed requests, again and again": malformed,
    "64 malformed requests of each new peer": new_identities,
    "21,200 unannounced pushes": unannounced_pushes,
    "200 made-up fast peers": made_up_peers,
    "48 MiB of int8 as [N, 1]": narrow_rows,
    "frames of empty tensors": empty_tensors,
    "8 unfinished requests": unfinished,
    "16 unread answers": unread_answers,
    "passes of 16,384 tokens": long_passes,
    "sessions with prompts of 4,096 tokens": long_prompts,
    "64 busy sessions that fill the cache": full_cache,
    "outputs of all inner modules": inner_modules,
}
