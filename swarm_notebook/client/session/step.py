"""One step of a session: the current pass goes through the chain, from a block on.

A hop that fails is replaced, and the step goes on from there. What has come back before is kept in
the pass, as the input of the blocks that follow.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Collection, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from swarm_notebook.client.request import Outputs, joined
from swarm_notebook.client.session.chain import Chain
from swarm_notebook.client.session.failover import FailoverPolicy
from swarm_notebook.client.session.history import Computed, History, Pass
from swarm_notebook.client.session.pipeline import HopLost, Stage, run_pipeline, split
from swarm_notebook.client.telemetry import HopTimes
from swarm_notebook.errors import RemoteError


class StepRun:
    """Runs the current pass of a history through a chain.

    Args:
        chain: the servers.
        history: of the session; the outputs that come back go into its current pass.
        failover: decides what follows when a server fails.
        states, inner: what is wanted besides the last block's output, as in `Request`.
        last: how many of the last positions of the last block's output are wanted; None for all.
            More may come.

    Attributes:
        times: of the servers asked so far, in the order of their answers.
        passed: tokens of the pass times blocks that they have passed.
    """

    def __init__(
        self,
        chain: Chain,
        history: History,
        failover: FailoverPolicy,
        states: Collection[int],
        inner: Collection[tuple[int, str]],
        *,
        last: int | None = None,
    ):
        self._chain, self._history, self._failover = chain, history, failover
        self._directory, self._current = chain.directory, history.current
        self._states, self._inner, self._last = states, inner, last
        self._asked = 1.0
        self.times: list[HopTimes] = []
        self.passed = 0

    async def run(self, first: int, stop: int) -> Outputs:
        """The outputs that are wanted of blocks ``[first, stop)``."""
        block, outputs = first, Outputs({}, {})
        while block < stop:
            stages = await self._plan(block, stop)
            self._ask_for_more(stages)
            done, lost = await self._attempt(stages, outputs, stop)
            block = done
            if lost is not None:
                hop = lost.stage.hop
                await self._chain.settle({stage.hop for stage in stages} - {hop})
                block = min(done, hop.start)
                self._failover.handle(lost, self._history)
        asked = {*self._states, stop - 1}
        outputs.states = {index: outputs.states[index] for index in asked & outputs.states.keys()}
        return outputs

    async def _plan(self, block: int, stop: int) -> list[Stage]:
        """The chain over blocks ``[block, stop)``; servers are chosen for those without."""
        self._chain.cut({*self._history.edited, *(block + 1 for block in self._states)})
        stages: list[Stage] = []
        tokens = self._current.rows * self._current.end
        while block < stop:
            hop = await self._chain.hop_for(block, self._failover.refusing, tokens)
            for start, end in itertools.pairwise(self._current.cuts(block, min(hop.end, stop))):
                stage = Stage(hop, start, end, given=start in self._current.edits)
                if stages and not stage.given:
                    before = stages[-1].hop
                    if self._directory.together(before.segment.span, hop.segment.span):
                        stage.source = before
                stages.append(stage)
            block = min(hop.end, stop)
        return stages

    def _ask_for_more(self, stages: Sequence[Stage]) -> None:
        """Now and then have more answers than are needed, so that they can be audited."""
        audits, last, length = self._directory.audits, self._last, self._current.length
        if audits is None or last is None or self._asked < 1 or last >= length:
            return
        segment, states = stages[-1].hop.segment, length * len(stages)
        more, share = audits.more_asked(segment, self._current.rows, length, states)
        if more > last and audits.draw_asked(share):
            self._last, self._asked = more, share

    async def _attempt(
        self, stages: Sequence[Stage], outputs: Outputs, stop: int
    ) -> tuple[int, HopLost | None]:
        """Run the current pass through the stages; up to which block it came, and what failed.

        What came back goes into ``outputs`` and into the pass.
        """
        parts = split(self._current, stages, divisible=not self._inner)
        got: list[list[Outputs]] = [[] for _ in stages]
        lost: HopLost | None = None
        try:
            await self._ready(stages)
            await self._send_parts(stages, parts, got, stop)
        except HopLost as failure:
            lost = failure
        for stage, found in zip(stages, got, strict=True):
            if len(found) < len(parts):
                return stage.start, lost
            whole = joined(found, dim=1)
            outputs.states.update(whole.states)
            outputs.inner.update(whole.inner)
            audited = self._directory.audits is not None
            if stage.end < self._directory.num_blocks or audited:
                self._current.inputs[stage.end] = self._filled_up(whole.states[stage.end - 1])
            if audited:
                known = whole.states[stage.end - 1].shape[1]
                asked = stage.end == stop and stage.hop.segment.span.shortens
                self._current.computed[stage.end] = self._computed(
                    stage, self._current.end - known, asked=asked
                )
                peer, peers = stage.hop.segment.peer, self._current.peers
                peers[peer] = min(peers.get(peer, stage.start), stage.start)
        return stages[-1].end, lost

    def _filled_up(self, state: torch.Tensor) -> torch.Tensor:
        """An output of which perhaps only the last positions came, with zeros before them."""
        missing = self._current.length - state.shape[1]
        return functional.pad(state, (0, 0, missing, 0)) if missing else state

    def _computed(self, stage: Stage, answered: int, *, asked: bool) -> Computed:
        adapter = self._history.adapter
        return Computed(
            stage.hop.segment,
            stage.start,
            None if adapter is None else (adapter.id, adapter.version),
            answered,
            self._asked if asked else 1.0,
        )

    async def _ready(self, stages: Sequence[Stage]) -> None:
        """Bring the servers of a chain to where the current pass begins."""
        for stage in stages:
            with _blaming(stage):
                await self._chain.catch_up(stage.hop, self._history, self.times)
        closed = [stage for stage in stages if not stage.hop.prepared(self._history.adapter)]
        if closed:
            work = [self._prepare(stage) for stage in closed]
            for result in await asyncio.gather(*work, return_exceptions=True):
                if result is not None:
                    raise result

    async def _prepare(self, stage: Stage) -> None:
        with _blaming(stage):
            await stage.hop.prepare(self._history.adapter)

    async def _send_parts(
        self,
        stages: Sequence[Stage],
        parts: Sequence[Pass],
        got: list[list[Outputs]],
        stop: int,
    ) -> None:
        """Send the parts of a pass through the stages, one behind the other."""
        taken: dict[int, HopTimes] = {}

        def deliver(length: int, number: int, outputs: Outputs, times: HopTimes) -> None:
            got[number].append(outputs)
            self.passed += length * (stages[number].end - stages[number].start)
            taken[number] = times.plus(taken.get(number))

        asked = (self._states, self._inner)
        requests = [
            [
                self._history.request(
                    stage.start,
                    stage.end,
                    part,
                    *asked,
                    later=number > 0,
                    last=self._last_of(part, stage, stop),
                )
                for number, stage in enumerate(stages)
            ]
            for part in parts
        ]
        hops = [stage.hop for stage in stages]
        for number, hop in enumerate(hops):
            # Whatever else a hop is asked in this pass comes after it has selected its rows.
            behind = hop.rows_version not in (None, self._history.rows_version)
            if behind and hop not in hops[:number]:
                requests[0][number].rows = self._history.rows
        runs = [
            run_pipeline(self._directory, stages, steps, partial(deliver, part.length))
            for part, steps in zip(parts, requests, strict=True)
        ]
        try:
            await _all(runs)
        finally:
            self.times.extend(taken[number] for number in sorted(taken))

    def _last_of(self, part: Pass, stage: Stage, stop: int) -> int | None:
        """How many positions are wanted of what a stage makes of a part; None for all."""
        if self._last is None or stage.end != stop or not stage.hop.segment.span.shortens:
            return None
        wanted = max(0, self._last - (self._current.end - part.end))
        return wanted if wanted < part.length else None


async def _all(runs: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait for all parts; the failure that lies first in the chain is raised.

    All come to an end: what lies before a failed server is not to be sent again.
    """
    if len(runs) == 1:
        await runs[0]
        return
    results = await asyncio.gather(*runs, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    lost = [error for error in errors if isinstance(error, HopLost)]
    for error in errors:
        if not isinstance(error, HopLost):
            raise error
    if lost:
        raise min(lost, key=lambda failure: failure.stage.start)


@contextlib.contextmanager
def _blaming(stage: Stage) -> Iterator[None]:
    """What goes wrong within is the failure of this stage."""
    try:
        yield
    except RemoteError as error:
        raise HopLost(stage, error) from None
