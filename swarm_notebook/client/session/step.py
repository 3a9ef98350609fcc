"""One step of a session: the current pass goes through the chain, from a block on.

A hop that fails is replaced, and the walk goes on from there. What has come back before is kept, in
the pass, for which it is the input of the blocks behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Collection, Coroutine, Iterator, Sequence
from typing import Any

from swarm_notebook.client.request import Outputs
from swarm_notebook.client.session.chain import Chain
from swarm_notebook.client.session.history import Pass
from swarm_notebook.client.session.losses import Losses
from swarm_notebook.client.session.pipeline import HopLost, Piece, carry, join, split
from swarm_notebook.client.telemetry import HopTimes
from swarm_notebook.errors import RemoteError


class Walk:
    """The walk of the current pass.

    Args:
        chain: the servers.
        losses: told of those that fail.
        states, inner: what is wanted besides the last block's output, as in `Request`.

    Attributes:
        trips: where the time went so far.
        passed: tokens of the pass times blocks that they have passed.
    """

    def __init__(
        self,
        chain: Chain,
        losses: Losses,
        states: Collection[int],
        inner: Collection[tuple[int, str]],
    ):
        self._chain, self._losses = chain, losses
        self._directory, self._feed = chain.directory, chain.feed
        self._states, self._inner = states, inner
        self.trips: list[HopTimes] = []
        self.passed = 0

    async def run(self, first: int, stop: int) -> Outputs:
        """The outputs that are wanted of blocks ``[first, stop)``."""
        block, outputs = first, Outputs({}, {})
        while block < stop:
            pieces = await self._plan(block, stop)
            done, lost = await self._attempt(pieces, outputs)
            block = done
            if lost is not None:
                hop = lost.piece.hop
                await self._chain.settle({piece.hop for piece in pieces} - {hop})
                block = min(done, hop.start)
                self._losses.take(lost)
        asked = {*self._states, stop - 1}
        outputs.states = {index: outputs.states[index] for index in asked & outputs.states.keys()}
        return outputs

    async def _plan(self, block: int, stop: int) -> list[Piece]:
        """The chain over blocks ``[block, stop)``; servers are chosen for those without."""
        current = self._feed.history.current
        pieces: list[Piece] = []
        while block < stop:
            hop = await self._chain.hop_for(block, self._losses.refusing)
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
        self, pieces: Sequence[Piece], outputs: Outputs
    ) -> tuple[int, HopLost | None]:
        """Run the current pass through the pieces; up to which block it came, and what failed.

        What came back goes into ``outputs`` and into the pass.
        """
        current = self._feed.history.current
        parts = split(current, pieces, divisible=not self._inner)
        got: list[list[Outputs]] = [[] for _ in pieces]
        lost: HopLost | None = None
        try:
            await self._ready(pieces)
            await self._carry(pieces, parts, got)
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
                await self._chain.catch_up(piece.hop, self.trips)
        closed = [piece for piece in pieces if not piece.hop.prepared(self._feed.adapter)]
        if closed:
            work = [self._prepare(piece) for piece in closed]
            for result in await asyncio.gather(*work, return_exceptions=True):
                if result is not None:
                    raise result

    async def _prepare(self, piece: Piece) -> None:
        with _blaming(piece):
            await piece.hop.prepare(self._feed.adapter)

    async def _carry(
        self, pieces: Sequence[Piece], parts: Sequence[Pass], got: list[list[Outputs]]
    ) -> None:
        """Send the parts of a pass through the pieces, one behind the other."""
        trips: dict[int, HopTimes] = {}

        def deliver(number: int, outputs: Outputs, times: HopTimes) -> None:
            got[number].append(outputs)
            piece = pieces[number]
            self.passed += outputs.states[piece.end - 1].shape[1] * (piece.end - piece.start)
            trips[number] = times.plus(trips.get(number))

        asked = (self._states, self._inner)
        requests = [
            [
                self._feed.request(piece.start, piece.end, part, *asked, later=number > 0)
                for number, piece in enumerate(pieces)
            ]
            for part in parts
        ]
        hops = [piece.hop for piece in pieces]
        for number, hop in enumerate(hops):
            # Whatever else a hop is asked in this pass comes after it has selected its rows.
            if hop.rows_version != self._feed.rows_version and hop not in hops[:number]:
                requests[0][number].rows = self._feed.rows
        journeys = [carry(self._directory, pieces, steps, deliver) for steps in requests]
        try:
            await _all(journeys)
        finally:
            self.trips.extend(trips[number] for number in sorted(trips))


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


@contextlib.contextmanager
def _blaming(piece: Piece) -> Iterator[None]:
    try:
        yield
    except RemoteError as error:
        raise HopLost(piece, error) from None
