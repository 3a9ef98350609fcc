"""A cached decode over a chain of servers that survives the loss of any of them.

The session holds one `Hop` per server of its chain and a `History` of what went in. A step walks
the chain from a block on; a hop that fails is replaced by a new chain over the same blocks, whose
caches are rebuilt by replaying the history, and the step goes on from there. A hop without a
cache (new, or of a session that has only a history) is caught up in the same way: there is one
mechanism for opening, resuming and failing over.

Within a pass, steps come in the order of their first block: the first from block 0, a further one
from block k when a hook changed the input of k.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Collection, Coroutine, Iterator, Sequence
from typing import Any

import torch

from swarm_notebook.client.adapters import Adapter
from swarm_notebook.client.directory import Directory
from swarm_notebook.client.events import Failover, HopTimes, Step, Timeline
from swarm_notebook.client.history import History, Pass
from swarm_notebook.client.hop import Hop
from swarm_notebook.client.passage import HopLost, Piece, carry, join, split
from swarm_notebook.client.request import Outputs, Request
from swarm_notebook.client.routing import describe_blocks
from swarm_notebook.errors import (
    AdapterMissing,
    BadRequest,
    CacheFull,
    MissingBlocks,
    RemoteError,
    ServerBusy,
    SessionLost,
)

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 2048


class InferenceSession:
    """KV caches for one batch of sequences on the servers of a chain.

    Args:
        directory: who serves the model.
        max_length: tokens per sequence that Petals servers reserve; ours grow as needed.
    """

    def __init__(self, directory: Directory, max_length: int | None = None):
        self.history = History()
        self.failovers = 0
        # What the blocks run with besides their own weights; set before a pass.
        self.adapter: Adapter | None = None
        self.prompts: torch.Tensor | None = None
        self._directory = directory
        self._max_length = max_length or DEFAULT_MAX_LENGTH
        self._hops: list[Hop] = []
        self._rows_version = 0
        self._rows: torch.Tensor | None = None
        # Where time goes, of the generation under way and of its present step.
        self._timeline: Timeline | None = None
        self._trips: list[HopTimes] = []
        # Tokens of the present step times blocks that they have passed.
        self.passed = 0
        # Within one step: servers that were lost, and those that refused it.
        self._lost: set[str] = set()
        self._refusing: set[str] = set()

    @property
    def hops(self) -> list[Hop]:
        """The servers in use, in the order of their blocks."""
        return list(self._hops)

    @property
    def latest(self) -> Step | None:
        """The step that last came back, if any."""
        steps = self._timeline.steps if self._timeline is not None else ()
        return steps[-1] if steps else None

    def select(self, rows: torch.Tensor) -> None:
        """From the next step on, continue these rows (beam search, batch changes)."""
        if self.history:
            self.history.select(rows)
            self._rows_version += 1
            self._rows = rows

    def begin_generation(self) -> None:
        """What follows is one generation, for those who watch (see `events`)."""
        self._timeline = self._directory.events.begin(time.perf_counter())

    def begin(self, new: Pass) -> None:
        """Start a pass; ``new.edits`` holds the input of block 0, and what follows is forgotten."""
        self.history.begin(new)

    def edit(self, block: int, hidden: torch.Tensor) -> None:
        """In the current pass, ``block`` gets this input instead of the one before's output."""
        self.history.current.edits[block] = hidden

    async def step(
        self,
        block: int,
        stop: int,
        states: Collection[int] = (),
        inner: Collection[tuple[int, str]] = (),
    ) -> Outputs:
        """Run the current pass from ``block``, whose input was given, up to ``stop``.

        Returns:
            the outputs of the blocks ``states`` and of the last one before ``stop``, and of the
            modules ``inner``.

        Raises:
            MissingBlocks: no server holds a block, and none came in time.
            BadRequest, CacheFull, ServerBusy: see the messages.
        """
        self._lost.clear()
        self._refusing.clear()
        self._trips, self.passed = [], 0
        began = time.perf_counter()
        timeline = self._timeline or self._directory.events.begin(began)
        self._timeline = timeline
        try:
            outputs = await self._walk(block, stop, states, inner)
        except asyncio.CancelledError:
            # An interrupt: the servers stop and free their caches, the history stays.
            self.close()
            raise
        now, current = time.perf_counter(), self.history.current
        rows, hops = outputs.states[stop - 1].shape[0], tuple(self._trips)
        step = Step(current.position, current.length, rows, began, now, hops)
        self._directory.events.passed(timeline, step)
        return outputs

    async def _walk(
        self,
        first: int,
        stop: int,
        states: Collection[int],
        inner: Collection[tuple[int, str]],
    ) -> Outputs:
        block, outputs = first, Outputs({}, {})
        while block < stop:
            pieces = await self._plan(block, stop)
            done, lost = await self._attempt(pieces, states, inner, outputs)
            block = done
            if lost is not None:
                await self._settle({piece.hop for piece in pieces} - {lost.piece.hop})
                block = min(done, lost.piece.hop.start)
                self._give_way(lost)
        asked = {*states, stop - 1}
        outputs.states = {index: outputs.states[index] for index in asked & outputs.states.keys()}
        return outputs

    async def _plan(self, block: int, stop: int) -> list[Piece]:
        """The chain over blocks ``[block, stop)``; servers are chosen for those without."""
        current = self.history.current
        pieces: list[Piece] = []
        while block < stop:
            hop = await self._hop_for(block)
            for start, end in itertools.pairwise(current.cuts(block, min(hop.end, stop))):
                piece = Piece(hop, start, end, given=start in current.edits)
                if pieces and not piece.given:
                    before = pieces[-1].hop
                    if self._directory.together(before.leg.span, hop.leg.span):
                        piece.source = before
                pieces.append(piece)
            block = min(hop.end, stop)
        return pieces

    async def _attempt(
        self,
        pieces: Sequence[Piece],
        states: Collection[int],
        inner: Collection[tuple[int, str]],
        outputs: Outputs,
    ) -> tuple[int, HopLost | None]:
        """Run the current pass through the pieces; up to which block it came, and what failed.

        What came back goes into ``outputs`` and into the pass.
        """
        current = self.history.current
        parts = split(current, pieces, divisible=not inner)
        got: list[list[Outputs]] = [[] for _ in pieces]
        lost: HopLost | None = None
        try:
            await self._ready(pieces)
            await self._carry(pieces, parts, states, inner, got)
        except HopLost as failure:
            lost = failure
        for piece, found in zip(pieces, got, strict=True):
            if len(found) < len(parts):
                return piece.start, lost
            whole = join(found)
            outputs.states.update(whole.states)
            outputs.inner.update(whole.inner)
            if piece.end < self._directory.num_blocks:
                current.inputs[piece.end] = whole.states[piece.end - 1]
        return pieces[-1].end, lost

    async def _ready(self, pieces: Sequence[Piece]) -> None:
        """Bring the servers of a chain to where the current pass begins."""
        for piece in pieces:
            with _blaming(piece):
                await self._catch_up(piece.hop)
        closed = [piece for piece in pieces if not piece.hop.prepared(self.adapter)]
        if closed:
            work = [self._prepare(piece) for piece in closed]
            for result in await asyncio.gather(*work, return_exceptions=True):
                if result is not None:
                    raise result

    async def _prepare(self, piece: Piece) -> None:
        with _blaming(piece):
            await piece.hop.prepare(self.adapter)

    async def _carry(
        self,
        pieces: Sequence[Piece],
        parts: Sequence[Pass],
        states: Collection[int],
        inner: Collection[tuple[int, str]],
        got: list[list[Outputs]],
    ) -> None:
        """Send the parts of a pass through the pieces, one behind the other."""
        trips: dict[int, HopTimes] = {}

        def deliver(number: int, outputs: Outputs, times: HopTimes) -> None:
            got[number].append(outputs)
            piece = pieces[number]
            self.passed += outputs.states[piece.end - 1].shape[1] * (piece.end - piece.start)
            trips[number] = times.plus(trips.get(number))

        requests = [
            [
                self._request(piece, part, states, inner, later=number > 0)
                for number, piece in enumerate(pieces)
            ]
            for part in parts
        ]
        hops = [piece.hop for piece in pieces]
        for number, hop in enumerate(hops):
            # Whatever else a hop is asked in this pass comes after it has selected its rows.
            if hop.rows_version != self._rows_version and hop not in hops[:number]:
                requests[0][number].rows = self._rows
        journeys = [carry(self._directory, pieces, asked, deliver) for asked in requests]
        try:
            await self._all(journeys)
        finally:
            self._trips.extend(trips[number] for number in sorted(trips))

    @staticmethod
    async def _all(journeys: Sequence[Coroutine[Any, Any, None]]) -> None:
        if len(journeys) == 1:
            await journeys[0]
            return
        # All come to an end: what lies before a failed server is not to be sent again.
        results = await asyncio.gather(*journeys, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        lost = [error for error in errors if isinstance(error, HopLost)]
        for error in errors:
            if not isinstance(error, HopLost):
                raise error
        if lost:
            raise min(lost, key=lambda failure: failure.piece.start)

    async def _run(self, hop: Hop, piece: tuple[int, int], part: Pass) -> Outputs:
        """One trip: the tokens of a pass through the blocks ``piece`` of a hop."""
        outputs, times = await hop.run(self._request(Piece(hop, *piece), part))
        self._trips.append(times)
        return outputs

    def _request(
        self,
        piece: Piece,
        part: Pass,
        states: Collection[int] = (),
        inner: Collection[tuple[int, str]] = (),
        *,
        later: bool = False,
    ) -> Request:
        """What the server of a piece is asked.

        Args:
            later: the hidden states come later, from the piece before; now only their shape is
                right.
        """
        start, end = piece.start, piece.end
        hidden = part.input_of(start)
        if hidden is None:
            if not later:
                raise LookupError(f"the history has no input of block {start}")
            hidden = next(iter(part.edits.values()))
        return Request(
            start,
            end,
            hidden,
            part.position,
            mask=part.mask,
            position_ids=part.position_ids,
            states=[index for index in states if start <= index < end - 1],
            inner=[named for named in inner if start <= named[0] < end],
            prompts=self._prompts(start, end, part),
            adapter=self.adapter,
            rows_version=self._rows_version,
        )

    def _prompts(self, start: int, end: int, part: Pass) -> torch.Tensor | None:
        """Deep prompts of these blocks, if the pass reaches into their positions."""
        prompts = self.prompts
        if prompts is None or part.position >= prompts.shape[2]:
            return None
        return prompts[start:end]

    async def _hop_for(self, block: int) -> Hop:
        """The hop that computes `block`; servers are chosen for a gap in the chain."""
        found = [hop for hop in self._hops if hop.start <= block < hop.end]
        if not found:
            await self._fill_gap(block)
            found = [hop for hop in self._hops if hop.start <= block < hop.end]
        return found[0]

    async def _fill_gap(self, block: int) -> None:
        """Choose servers for the blocks around `block` that have none."""
        start = max((hop.end for hop in self._hops if hop.end <= block), default=0)
        last = self._directory.num_blocks
        end = min((hop.start for hop in self._hops if hop.start > block), default=last)
        for leg in await self._directory.await_chain(start, end, self._refusing):
            self._hops.append(Hop(leg, self._directory, self._max_length, self._rows_version))
        self._hops.sort(key=lambda hop: hop.start)

    async def _catch_up(self, hop: Hop) -> None:
        """Rebuild a hop's cache, if it lacks something of what precedes the current pass."""
        until = self.history.current.position
        behind = self._rows_version - hop.rows_version
        if hop.position >= until and behind <= 1:
            return
        hop.reset(self._rows_version)
        for part in self.history.replay(hop.start, hop.end, until):
            for piece in itertools.pairwise(part.cuts(hop.start, hop.end)):
                got = await self._run(hop, piece, part)
            self.history.learn(hop.end, part.position, got.states[hop.end - 1])

    async def _settle(self, hops: Collection[Hop]) -> None:
        """Free those of a chain that wait for states which a lost server does not push."""
        waiting = [hop for hop in hops if hop.owes]
        work = [hop.settle() for hop in waiting]
        results = await asyncio.gather(*work, return_exceptions=True)
        for hop, error in zip(waiting, results, strict=True):
            if isinstance(error, RemoteError):
                # Perhaps for the lost one's sake: it is asked again, from the beginning.
                hop.reset(self._rows_version)
            elif error is not None:
                raise error

    def _give_way(self, lost: HopLost) -> None:
        """Go on without a failed hop, or without handing its input from server to server."""
        piece, error = lost.piece, lost.error
        if piece.source is not None and isinstance(error, BadRequest):
            # Perhaps its input was not what the client would have sent.
            self._directory.keep_apart(piece.source.leg.peer, piece.hop.leg.peer)
            piece.hop.reset(self._rows_version)
        else:
            self._lose(piece.hop, error)

    def _lose(self, hop: Hop, error: RemoteError) -> None:
        """Drop a failed hop, so that its blocks are a gap; raise what no other server can mend."""
        hop.close()
        self._hops.remove(hop)
        self.failovers += 1
        if self._timeline is not None:
            leg = hop.leg
            lost = Failover(
                leg.peer, leg.span.name, hop.start, hop.end, str(error), time.perf_counter()
            )
            self._directory.events.lost(self._timeline, lost)
        peer, blocks = hop.leg.peer, describe_blocks(range(hop.start, hop.end))
        if isinstance(error, (BadRequest, CacheFull, ServerBusy)):
            self._refuse(hop, error)
            logger.info("%s; trying %s on another server", error, blocks)
            return
        # A server may lose what it had, once; one that says so again and again is broken.
        forgiven = peer not in self._lost
        self._lost.add(peer)
        if isinstance(error, AdapterMissing) and self.adapter is not None and forgiven:
            self._directory.uploaded.pop((peer, self.adapter.id), None)
        elif isinstance(error, SessionLost) and forgiven:
            logger.warning("%s; rebuilding the cache", error)
        else:
            self._directory.failed(peer, str(error))
            logger.warning("%s; continuing %s on another server", error, blocks)

    def _refuse(self, hop: Hop, error: BadRequest | CacheFull | ServerBusy) -> None:
        """Leave a server that refused the step out of it; raise if the others would refuse too.

        One server that finds a request invalid may be wrong itself, two are believed.
        """
        believed = isinstance(error, BadRequest) and bool(self._refusing)
        self._refusing.add(hop.leg.peer)
        try:
            self._directory.chain(hop.start, hop.end, self._refusing)
        except MissingBlocks:
            believed = True
        if believed:
            raise error

    def close(self) -> None:
        """Leave all servers; the history stays, so that a later step can resume."""
        for hop in self._hops:
            hop.close()
        self._hops = []


@contextlib.contextmanager
def _blaming(piece: Piece) -> Iterator[None]:
    try:
        yield
    except RemoteError as error:
        raise HopLost(piece, error) from None
