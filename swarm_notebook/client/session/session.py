"""A cached decode over a chain of servers that survives the loss of any of them.

What went in is kept (`history`), so every cache can be rebuilt. The servers form a `chain`, whose
gaps are filled when they are needed; a `step` runs the current pass through it, and `failover`
decides what follows when a server fails.

Within a pass, steps come in the order of their first block: the first from block 0, a further one
from block k when a hook changed the input of k.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

import torch

from swarm_notebook.client.adapters import Adapter
from swarm_notebook.client.request import Outputs
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.session.chain import Chain
from swarm_notebook.client.session.failover import FailoverPolicy
from swarm_notebook.client.session.history import History, Pass
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.session.step import StepRun
from swarm_notebook.client.telemetry import StepRecord, Timeline

logger: logging.Logger = logging.getLogger(__name__)

# The most that a Petals server reserves by default for models without grouped queries.
DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Given:
    """What a pass runs with besides the blocks' own weights.

    Attributes:
        prompts: deep prompts, ``[blocks, rows or 1, length, hidden]``.
        absent: blocks that no server computes: they run in the notebook, or not at all.
    """

    adapter: Adapter | None = None
    prompts: torch.Tensor | None = None
    absent: frozenset[int] = frozenset()


class InferenceSession:
    """KV caches for one batch of sequences on the servers of a chain.

    Args:
        directory: who serves the model.
        max_length: tokens per sequence that Petals servers reserve; ours grow as needed.

    Attributes:
        history: what went in so far.
        timeline: the generation under way, if any.
    """

    def __init__(self, directory: Directory, max_length: int | None = None):
        self.history: History = History()
        self._directory, self._telemetry = directory, directory.telemetry
        self._known_wrong = 0
        self._chain = Chain(directory, max_length or DEFAULT_MAX_LENGTH)
        self._absent: frozenset[int] = frozenset()
        self.timeline: Timeline | None = None
        self._run: StepRun | None = None
        # A step that is interrupted may end later than the next one is asked for.
        self._stepping = asyncio.Lock()

    @property
    def hops(self) -> list[Hop]:
        """The servers in use, in the order of their blocks."""
        return self._chain.hops

    @property
    def failovers(self) -> int:
        return self._chain.dropped

    @property
    def passed(self) -> int:
        """Tokens of the present step times blocks that they have passed."""
        return self._run.passed if self._run is not None else 0

    @property
    def latest(self) -> StepRecord | None:
        """The step that last came back, if any."""
        steps = self.timeline.steps if self.timeline is not None else ()
        return steps[-1] if steps else None

    def begin_generation(self) -> Timeline:
        """What follows is one generation, for those who watch (see `telemetry`)."""
        self.timeline = self._telemetry.begin(time.perf_counter())
        return self.timeline

    def begin(self, new: Pass, given: Given) -> None:
        """Start a pass, whose ``edits`` hold the input of the first block.

        What follows its position is forgotten.
        """
        self._absent = given.absent
        self.history.adapter, self.history.prompts = given.adapter, given.prompts
        self.history.begin(new)

    def copy_from(self, other: InferenceSession) -> None:
        """Begin where another session is; its servers copy their caches when they are needed."""
        self.history, self._absent = other.history.copy(), other._absent
        self._chain.copy_from(other._chain)

    async def step(
        self,
        block: int,
        stop: int,
        states: Collection[int] = (),
        inner: Collection[tuple[int, str]] = (),
        *,
        last: int | None = None,
    ) -> Outputs:
        """Run the current pass from ``block``, whose input was given, up to ``stop``.

        Args:
            last: how many of the last positions of the last block's output are wanted; None for
                all. More may come.

        Returns:
            the outputs of the blocks ``states`` and of the last one before ``stop``, and of the
            modules ``inner``.

        Raises:
            MissingBlocks: no server holds a block, and none came in time.
            BadRequest, CacheFull, ServerBusy: see the messages.
        """
        async with self._stepping:
            if self._chain.absent != self._absent:
                self._chain.close()
                self._chain.absent = self._absent
            self._leave_liars()
            began = time.perf_counter()
            timeline = self.timeline or self._telemetry.begin(began)
            self.timeline = timeline
            failover = FailoverPolicy(self._chain, timeline, self.history.adapter)
            self._run = run = StepRun(self._chain, self.history, failover, states, inner, last=last)
            try:
                outputs = await run.run(block, stop)
            except asyncio.CancelledError:
                # An interrupt: the servers stop and free their caches, the history stays.
                self.close()
                raise
            now, current = time.perf_counter(), self.history.current
            rows, hops = outputs.states[stop - 1].shape[0], tuple(run.times)
            first = self._directory.begins_at(block)
            step = StepRecord(current.position, current.length, rows, began, now, hops, first)
            self._telemetry.passed(timeline, step)
            if self._directory.audits is not None:
                self._directory.audits.step(self.history)
            return outputs

    def _leave_liars(self) -> None:
        """Rebuild elsewhere what servers have had a part in that were found wrong since."""
        wrong = self._directory.health.wrong
        # What has come of the present pass is in the user's hands: the next one begins anew.
        if len(wrong) == self._known_wrong or self.history.current.inputs:
            return
        self._known_wrong = len(wrong)
        found = self.history.distrust(wrong.keys())
        if found is None:
            return
        block, position = found
        for hop in self._chain.hops:
            if hop.segment.peer in wrong:
                self._chain.drop(hop)
            elif hop.start >= block:
                hop.reset()
        logger.warning(
            "a server of this text was found wrong: from token %d on it may be wrong; what "
            "follows is computed elsewhere",
            position + 1,
        )

    def close(self) -> None:
        """Leave all servers; the history stays, so that a later step can resume."""
        self._chain.close()
