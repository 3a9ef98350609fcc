"""Other servers replay a piece: which of them can, and what they make of it.

A *witness* is drawn among those who have all blocks of the piece; where there is none, the best
chain of several stands for one. It must be able to compute in float32 what the server in question
has computed, so its weights are those of the checkpoint or rounded to the same dtype, and packed
to the same bits if that one's are.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from swarm_notebook.client.audit import piece
from swarm_notebook.client.audit.comparison import Result
from swarm_notebook.client.audit.piece import Piece
from swarm_notebook.client.passes.backward import PassGradients, backward_segment
from swarm_notebook.client.passes.forward import forward_segment
from swarm_notebook.client.servers.bits import packing_of
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.errors import MissingBlocks, RemoteError
from swarm_notebook.net.dht.records import ServerState
from swarm_notebook.net.wire import tensors

logger: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replay:
    """What somebody else made of a piece's input: in float32, and in the server's own dtype."""

    by: tuple[str, ...]
    peers: frozenset[str]
    reference: Result
    twin: Result | None


class Witnesses:
    """Those of one model.

    Args:
        directory: who serves it.
        source: of randomness; nobody is to know who is drawn.
    """

    def __init__(self, directory: Directory, source: random.Random):
        self._directory, self._source = directory, source

    async def replay(self, found: Piece, exclude: Collection[str]) -> Replay | None:
        """What another server, drawn at random, or a chain of them, makes of the input."""
        excluded = set(exclude)
        while True:
            chain = self._chosen(found, excluded)
            if chain is None:
                return None
            dtype = piece.dtype_of(found.segment)
            try:
                reference = await self._run(found, chain, torch.float32)
                half = dtype not in (None, torch.float32)
                twin = await self._run(found, chain, dtype) if half and dtype else None
            except RemoteError as error:
                logger.info("an audit goes elsewhere: %s", error)
                excluded |= {part.peer for part in chain}
                continue
            names = tuple(part.span.name for part in chain)
            return Replay(names, frozenset(part.peer for part in chain), reference, twin)

    def _chosen(self, found: Piece, exclude: set[str]) -> list[RouteSegment] | None:
        """Servers to replay a piece: one that has all its blocks, or else the best chain."""
        start, end, dtype = found.segment.start, found.segment.end, piece.dtype_of(found.segment)

        def able(segment: RouteSegment) -> bool:
            # Weights that were rounded to a half cannot say what others give, nor can those that
            # were packed in another way.
            exact = piece.dtype_of(segment) in (torch.float32, dtype)
            same = packing_of(segment) == packing_of(cut(segment))
            return segment.span.casts and exact and same and segment.peer not in exclude

        def cut(segment: RouteSegment) -> RouteSegment:
            """The share of the server in question in a witness's blocks."""
            return replace(
                found.segment, start=max(start, segment.start), end=min(end, segment.end)
            )

        online = [
            RouteSegment(span, start, end)
            for span in self._directory.usable()
            if span.info.state == ServerState.ONLINE and span.start <= start and end <= span.end
        ]
        single = [segment for segment in online if able(segment)]
        if single:
            return [self._source.choice(single)]
        unable = {
            span.peer
            for span in self._directory.snapshot.spans
            if span.start < end
            and start < span.end
            and not able(RouteSegment(span, max(start, span.start), min(end, span.end)))
        }
        try:
            return self._directory.chain(start, end, unable)
        except MissingBlocks:
            return None

    async def _run(self, found: Piece, chain: Sequence[RouteSegment], dtype: torch.dtype) -> Result:
        request = replace(found.request, dtype=tensors.dtype_name(dtype))
        if request.adapter is not None:
            # Not the one in use, of which a server keeps one state: this may be an older one.
            request.adapter = replace(request.adapter, id=f"audit-{request.adapter.id}")
        hidden, parts = request.hidden, []
        for segment in chain:
            parts.append(request.part(segment.start, segment.end, hidden))
            if found.grad is None or segment is not chain[-1]:
                outputs = await forward_segment(self._directory, segment, parts[-1])
                hidden = outputs.states[segment.end - 1]
        if found.grad is None:
            return hidden
        gathered = PassGradients(found.grad)
        for segment, part in zip(reversed(chain), reversed(parts), strict=True):
            got = await backward_segment(self._directory, segment, part, gathered.input)
            gathered.input = got.input
            gathered.prompts.update(got.prompts)
            gathered.weights.update(got.weights)
        return gathered
