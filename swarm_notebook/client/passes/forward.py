"""A forward pass without a cache over a chain of servers; a failed server's part is repeated.

The rows of a batch go through the chain in groups, one behind the other, so that the second
server works on the first group while the first server works on the second. What the pass leaves
for its backward (each segment's input, and the name under which the server may have kept its
activations) is returned as a `Trail` per group.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from swarm_notebook.client.adapters import call_with_adapter
from swarm_notebook.client.passes.call import server_name
from swarm_notebook.client.passes.padding import is_plain, put_back, without_padding
from swarm_notebook.client.request import (
    Outputs,
    Request,
    answer_bytes,
    as_short_as_exact,
    beside_loop,
    joined,
    read_outputs,
    refuse_extensions,
    travelling,
)
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment, Work, describe_blocks
from swarm_notebook.client.servers.waiting import await_chain
from swarm_notebook.client.telemetry import Failover, HopBlocks, PassRecord
from swarm_notebook.errors import BadRequest, MissingBlocks, NotAMember, RemoteError
from swarm_notebook.net.wire import protocol, tensors

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

# While a server computes one group, the next is under way to it; more would only make them smaller.
GROUPS_PER_SERVER = 2
# Half of what a server lets one peer's passes wait (`server.engine.scheduling.scheduler`).
MAX_AT_ONCE = 32


@dataclass
class Trail:
    """What a forward pass leaves behind for its backward, for a group of rows.

    Attributes:
        rows: which rows of the batch.
        segments: the servers, with the input that each got and the name it was asked to keep it
            under.
    """

    rows: slice
    segments: list[tuple[RouteSegment, torch.Tensor, str | None]]


async def forward(
    directory: Directory, request: Request, *, keep: bool = False
) -> tuple[Outputs, list[Trail]]:
    """Run a request through whatever chain of servers covers its blocks.

    Args:
        keep: a backward may follow, so servers should keep the activations if they have room.

    Raises:
        MissingBlocks: no server holds a block, and none came in time.
        BadRequest: two servers, or the only one, found the request invalid.
    """
    began, (rows, length) = time.perf_counter(), request.hidden.shape[:2]
    work = Work(prompt=rows * length, answer=0)
    found = await await_chain(directory, request.start, request.end, work=work)
    chain = _cut(found, request)
    groups = row_groups(rows, len(chain), _most_rows(chain, length))
    results = await together(
        [_forward_rows(directory, take_rows(request, group), chain, keep) for group in groups]
    )
    hops = tuple(
        HopBlocks(segment.peer, segment.span.name, segment.start, segment.end)
        for _, segments in results
        for segment, _, _ in segments
    )
    first = directory.begins_at(request.start)
    record = PassRecord(length, rows, began, time.perf_counter(), hops, first)
    directory.telemetry.publish(record)
    trails = [Trail(rows, segments) for rows, (_, segments) in zip(groups, results, strict=True)]
    return joined([outputs for outputs, _ in results], dim=0), trails


def _cut(chain: Sequence[RouteSegment], request: Request) -> list[RouteSegment]:
    """A chain with the segments of Petals' servers cut where a request wants states."""
    return [part for segment in chain for part in segment.cut(request.boundaries)]


def _most_rows(chain: Sequence[RouteSegment], length: int) -> int | None:
    """How many rows of ``length`` all servers of a chain take in one request, if they say so.

    One row in any case: whatever is too long for a server is for it to refuse.
    """
    announced = (segment.span.info.cache_tokens_total for segment in chain)
    limits = [tokens for tokens in announced if tokens is not None]
    return max(1, min(limits) // max(length, 1)) if limits else None


def row_groups(rows: int, servers: int, most: int | None = None) -> list[slice]:
    """Rows split for a pipeline of ``servers``: enough groups to keep all busy, none empty.

    Args:
        most: rows of a group.
    """
    count = 1 if servers < 2 else min(rows, servers * GROUPS_PER_SERVER)
    if most is not None:
        count = max(count, -(-rows // most))
    bounds = [rows * number // count for number in range(count + 1)]
    return [slice(low, high) for low, high in itertools.pairwise(bounds)]


def take_rows(request: Request, rows: slice) -> Request:
    """The request for some of its rows only."""
    ids, prompts = request.position_ids, request.prompts
    return replace(
        request,
        hidden=request.hidden[rows],
        adapter=None if request.adapter is None else request.adapter.for_rows(rows),
        mask=None if request.mask is None else request.mask[rows],
        position_ids=ids if ids is None or ids.shape[0] == 1 else ids[rows],
        prompts=prompts if prompts is None or prompts.shape[1] == 1 else prompts[:, rows],
    )


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first failure cancels the rest and is raised as it is.

    No more than `MAX_AT_ONCE` run at a time.
    """
    if len(work) == 1:
        return [await work[0]]
    room = asyncio.Semaphore(MAX_AT_ONCE)

    async def wait_and_run(coroutine: Coroutine[Any, Any, T]) -> T:
        async with room:
            return await coroutine

    tasks = [asyncio.ensure_future(wait_and_run(coroutine)) for coroutine in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _forward_rows(
    directory: Directory, request: Request, chain: Sequence[RouteSegment], keep: bool
) -> tuple[Outputs, list[tuple[RouteSegment, torch.Tensor, str | None]]]:
    outputs, asked_of = Outputs({}, {}), []
    start, hidden, remaining = request.start, request.hidden, list(chain)
    refusals = Refusals(directory)
    while start < request.end:
        if not remaining:
            remaining = _cut(await refusals.await_chain(start, request.end), request)
        segment = remaining.pop(0)
        if directory.is_left(segment.peer):  # it has failed since it was chosen
            remaining = []
            continue
        kept = str(uuid.uuid4()) if keep and segment.span.extended else None
        part = request.part(segment.start, segment.end, hidden)
        try:
            got = await forward_segment(directory, segment, part, kept)
        except (BadRequest, NotAMember) as error:
            refusals.add(segment, error)
            remaining = []
            continue
        except RemoteError as error:
            give_up(directory, segment, error)
            remaining = []
            continue
        refusals.taken()
        directory.succeeded(segment.peer)
        if directory.audits is not None:
            answer = got.states[segment.end - 1]
            directory.audits.forwarded(segment, part, answer, kept is not None)
        outputs.states.update(got.states)
        outputs.inner.update(got.inner)
        asked_of.append((segment, hidden, kept))
        hidden, start = got.states[segment.end - 1], segment.end
    asked = {*request.states, request.end - 1}
    outputs.states = {block: outputs.states[block] for block in asked}
    return outputs, asked_of


async def forward_segment(
    directory: Directory, segment: RouteSegment, part: Request, kept: str | None = None
) -> Outputs:
    """What one server makes of its part of a pass, whatever becomes of it.

    Args:
        kept: the name under which the server is to keep the activations.

    Raises:
        RemoteError: what the server says, or what is wrong with it.
    """
    if segment.span.extended or is_plain(part):
        return await _forward_once(directory, segment, part, kept)
    groups = without_padding(part, server_name(segment))
    got = await together(
        [_forward_once(directory, segment, group.request(part), kept) for group in groups]
    )
    block = segment.end - 1
    states = [outputs.states[block] for outputs in got]
    return Outputs({block: put_back(groups, states, part.hidden)}, {})


async def _forward_once(
    directory: Directory, segment: RouteSegment, part: Request, kept: str | None
) -> Outputs:
    server = server_name(segment)
    refuse_extensions(segment.span, server, part)
    metadata = part.options() | ({"keep": kept} if kept else {})
    # Where a backward follows, or a comparison, nothing but the true activations will do.
    true = bool(kept or part.dtype)
    compression = tensors.NONE if true else directory.compression_for(segment.span)
    if compression:
        metadata["output_compression"] = (compression,)
    hidden = part.hidden
    if part.dtype:
        hidden = as_short_as_exact(hidden)
    elif not kept:
        hidden = travelling(hidden, segment.span)
    slots = [hidden, part.prompts, part.mask, part.position_ids]
    answer = await call_with_adapter(
        directory,
        segment,
        part.adapter,
        protocol.RPC_FORWARD_STREAM,
        slots,
        metadata,
        always=2,
        most=answer_bytes(part),
        compression=compression,
    )
    return await beside_loop(answer.size, partial(read_outputs, answer.tensors, part, server))


class Refusals:
    """Servers that called a request wrong. One may be wrong itself, two that say so are believed.

    A server that refused is left out; it is avoided as soon as another one has taken the request.
    """

    def __init__(self, directory: Directory):
        self._directory = directory
        self._by_peer: dict[str, tuple[RouteSegment, BadRequest | NotAMember]] = {}

    def add(self, segment: RouteSegment, error: BadRequest | NotAMember) -> None:
        """A server refuses its part.

        Raises:
            BadRequest, NotAMember: it is not the first.
        """
        if self._by_peer:
            raise error
        self._by_peer[segment.peer] = segment, error

    def taken(self) -> None:
        """Another server has done what was refused: whoever refused is at fault."""
        for segment, error in self._by_peer.values():
            give_up(self._directory, segment, error)
        self._by_peer.clear()

    async def await_chain(self, start: int, end: int) -> list[RouteSegment]:
        """`waiting.await_chain` without those that refused.

        Raises:
            BadRequest, NotAMember: what they said, if no other server has the blocks.
        """
        if not self._by_peer:
            return await await_chain(self._directory, start, end)
        try:
            # Not waited for: a request that is wrong is to be called so at once.
            return self._directory.chain(start, end, list(self._by_peer))
        except MissingBlocks:
            raise next(error for _, error in self._by_peer.values()) from None


def give_up(directory: Directory, segment: RouteSegment, error: RemoteError) -> None:
    """Avoid a server that failed, and say that its part goes elsewhere."""
    directory.failed(segment.peer, error)
    directory.telemetry.lost(None, Failover.of(segment, error))
    blocks = describe_blocks(range(segment.start, segment.end))
    logger.warning("%s; repeating %s on another server", error, blocks)
