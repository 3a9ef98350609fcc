"""A forward pass without a cache over a chain of servers; a failed server's part is repeated."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from swarm_notebook.client.directory import Directory
from swarm_notebook.client.hop import (
    OPEN_TIMEOUT,
    TRANSPORT_ERRORS,
    Request,
    read_outputs,
    refuse_extensions,
)
from swarm_notebook.client.routing import Leg, describe_blocks
from swarm_notebook.client.watch import Watch
from swarm_notebook.errors import BadRequest, RemoteError, ServerFailed
from swarm_notebook.net import protocol, streams, tensors

logger = logging.getLogger(__name__)


async def forward(directory: Directory, request: Request) -> dict[int, torch.Tensor]:
    """Run a request through whatever chain of servers covers its blocks.

    Returns:
        outputs by block: those in ``request.states`` and of block ``request.end - 1``.

    Raises:
        MissingBlocks: no server holds a block, and none came in time.
        BadRequest: a server found the request invalid.
    """
    outputs: dict[int, torch.Tensor] = {}
    chain: list[Leg] = []
    start, hidden = request.start, request.hidden
    while start < request.end:
        if not chain:
            chain = await directory.await_chain(start, request.end)
        leg = chain.pop(0)
        states = [block for block in request.states if leg.start <= block < leg.end - 1]
        part = replace(request, start=leg.start, end=leg.end, hidden=hidden, states=states)
        try:
            got = await _run_leg(directory, leg, part)
        except BadRequest:
            raise
        except RemoteError as error:
            directory.failed(leg.peer, str(error))
            blocks = describe_blocks(range(leg.start, leg.end))
            logger.warning("%s; repeating %s on another server", error, blocks)
            chain = []
            continue
        directory.succeeded(leg.peer)
        outputs.update(got)
        hidden, start = got[leg.end - 1], leg.end
    return outputs


async def _run_leg(directory: Directory, leg: Leg, request: Request) -> dict[int, torch.Tensor]:
    server = f"server {leg.span.name} ({describe_blocks(range(leg.start, leg.end))})"
    refuse_extensions(leg.span, server, request)
    watch: Watch | None = None
    stream: streams.Stream | None = None
    try:
        async with asyncio.timeout(OPEN_TIMEOUT):
            stream = await streams.open_stream(
                directory.node.p2p, PeerID.from_base58(leg.peer), protocol.RPC_FORWARD_STREAM
            )
        what = f"{server} to run {tuple(request.hidden.shape)}"
        watch = Watch(directory, leg.peer, what, stream)
        with watch.running():
            for message in _messages(directory.prefix, request):
                await stream.send(message)
            await stream.send_end()
            parts = await _receive_parts(stream)
    except TRANSPORT_ERRORS as error:
        verdict = watch.verdict if watch else ""
        raise ServerFailed(f"{server} {verdict or f'is gone ({error})'}") from None
    finally:
        if stream is not None:
            stream.close()
    return read_outputs(tensors.join(parts), request, server)


def _messages(prefix: str, request: Request) -> Iterator[runtime_pb2.ExpertRequest]:
    """The request, cut into messages of one tensor part each, as Petals streams it."""
    uid = protocol.uid_chain(prefix, request.start, request.end)
    metadata = protocol.pack_metadata({"states": request.states} if request.states else {})
    slots = [request.hidden, None, request.mask, request.position_ids]
    for tensor in protocol.pack_slots(slots, always=2):
        for part in tensors.split(tensor, protocol.PART_BYTES):
            yield runtime_pb2.ExpertRequest(uid=uid, tensors=[part], metadata=metadata)


async def _receive_parts(stream: streams.Stream) -> list[runtime_pb2.Tensor]:
    parts: list[runtime_pb2.Tensor] = []
    while (message := await stream.receive(runtime_pb2.ExpertResponse)) is not None:
        parts.extend(message.tensors)
    return parts
