"""One step of a session: the current pass goes through the chain, from a block on.

A hop that fails is replaced, and the step goes on from there. What has come back before is kept, in
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
from swarm_notebook.client.session.losses import Failures
from swarm_notebook.client.session.pipeline import HopLost, Stage, carry, join, split
from swarm_notebook.client.telemetry import HopTimes
from swarm_notebook.errors import RemoteError


class StepRun:
    """The way of the current pass through the chain.

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
        losses: Failures,
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
            stages = await self._plan(block, stop)
            done, lost = await self._attempt(stages, outputs)
            block = done
            if lost is not None:
                hop = lost.stage.hop
                await self._chain.settle({stage.hop for stage in stages} - {hop})
                block = min(done, hop.start)
                self._losses.take(lost)
        asked = {*self._states, stop - 1}
        outputs.states = {index: outputs.states[index] for index in asked & outputs.states.keys()}
        return outputs

    async def _plan(self, block: int, stop: int) -> list[Stage]:
        """The chain over blocks ``[block, stop)``; servers are chosen for those without."""
        current = self._feed.history.current
        stages: list[Stage] = []
        while block < stop:
            hop = await self._chain.hop_for(block, self._losses.refusing)
            for start, end in itertools.pairwise(current.cuts(block, min(hop.end, stop))):
                stage = Stage(hop, start, end, given=start in current.edits)
                if stages and not stage.given:
                    before = stages[-1].hop
                    if self._directory.together(before.segment.span, hop.segment.span):
                        stage.source = before
                stages.append(stage)
            block = min(hop.end, stop)
        return stages

    async def _attempt(
        self, stages: Sequence[Stage], outputs: Outputs
    ) -> tuple[int, HopLost | None]:
        """Run the current pass through the stages; up to which block it came, and what failed.

        What came back goes into ``outputs`` and into the pass.
        """
        current = self._feed.history.current
        parts = split(current, stages, divisible=not self._inner)
        got: list[list[Outputs]] = [[] for _ in stages]
        lost: HopLost | None = None
        try:
            await self._ready(stages)
            await self._carry(stages, parts, got)
        except HopLost as failure:
            lost = failure
        for stage, found in zip(stages, got, strict=True):
            if len(found) < len(parts):
                return stage.start, lost
            whole = join(found)
            outputs.states.update(whole.states)
            outputs.inner.update(whole.inner)
            if stage.end < self._directory.num_blocks:
                current.inputs[stage.end] = whole.states[stage.end - 1]
        return stages[-1].end, lost

    async def _ready(self, stages: Sequence[Stage]) -> None:
        """Bring the servers of a chain to where the current pass begins."""
        for stage in stages:
            with _blaming(stage):
                await self._chain.catch_up(stage.hop, self.trips)
        closed = [stage for stage in stages if not stage.hop.prepared(self._feed.adapter)]
        if closed:
            work = [self._prepare(stage) for stage in closed]
            for result in await asyncio.gather(*work, return_exceptions=True):
                if result is not None:
                    raise result

    async def _prepare(self, stage: Stage) -> None:
        with _blaming(stage):
            await stage.hop.prepare(self._feed.adapter)

    async def _carry(
        self, stages: Sequence[Stage], parts: Sequence[Pass], got: list[list[Outputs]]
    ) -> None:
        """Send the parts of a pass through the stages, one behind the other."""
        trips: dict[int, HopTimes] = {}

        def deliver(number: int, outputs: Outputs, times: HopTimes) -> None:
            got[number].append(outputs)
            stage = stages[number]
            self.passed += outputs.states[stage.end - 1].shape[1] * (stage.end - stage.start)
            trips[number] = times.plus(trips.get(number))

        asked = (self._states, self._inner)
        requests = [
            [
                self._feed.request(stage.start, stage.end, part, *asked, later=number > 0)
                for number, stage in enumerate(stages)
            ]
            for part in parts
        ]
        hops = [stage.hop for stage in stages]
        for number, hop in enumerate(hops):
            # Whatever else a hop is asked in this pass comes after it has selected its rows.
            if hop.rows_version != self._feed.rows_version and hop not in hops[:number]:
                requests[0][number].rows = self._feed.rows
        journeys = [carry(self._directory, stages, steps, deliver) for steps in requests]
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
        raise min(lost, key=lambda failure: failure.stage.start)


@contextlib.contextmanager
def _blaming(stage: Stage) -> Iterator[None]:
    try:
        yield
    except RemoteError as error:
        raise HopLost(stage, error) from None
