"""The servers that hold a session's caches, in the order of their blocks.

A chain may have gaps: a new one is nothing else, a lost server leaves one, and a gap is filled when
its blocks are to be computed. A server without a cache, or whose cache lacks something, is caught
up by replaying the history: there is one mechanism for opening, resuming and failing over. Only a
chain that is another one's copy begins with copies of its caches, if they are still there.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection

from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import ANSWER_TOKENS, RouteSegment, Work
from swarm_notebook.client.servers.waiting import await_chain
from swarm_notebook.client.session.history import History
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.telemetry import HopTimes
from swarm_notebook.errors import RemoteError


class Chain:
    """The hops of one session.

    Args:
        directory: who serves the model.
        max_length: tokens per sequence that Petals servers reserve.

    Attributes:
        dropped: how many hops failed so far.
        absent: blocks that no server computes for this session.
    """

    directory: Directory

    def __init__(self, directory: Directory, max_length: int):
        self.directory, self._max_length = directory, max_length
        self._hops: list[Hop] = []
        self._cuts: set[int] = set()
        self.dropped: int = 0
        self.absent: frozenset[int] = frozenset()

    @property
    def hops(self) -> list[Hop]:
        """The servers in use, in the order of their blocks."""
        return list(self._hops)

    def copy_from(self, other: Chain) -> None:
        """Begin with copies of another chain's caches, on its servers, where those make copies."""
        copies = (hop.copied() for hop in other.hops)
        self._hops = [hop for hop in copies if hop is not None]
        self._cuts, self.absent = set(other._cuts), other.absent

    def cut(self, boundaries: Collection[int]) -> None:
        """From now on, have the states at the inputs of these blocks (`RouteSegment.cut`).

        A session on a Petals server is bound to the blocks of its first request: one that has a
        boundary inside is left for several, which are caught up. The cuts stay when nobody looks
        any more: a round trip more per token costs less than another replay.
        """
        new = set(boundaries) - self._cuts
        if not new:
            return
        self._cuts |= new
        cut: list[Hop] = []
        for hop in self._hops:
            parts = hop.segment.cut(self._cuts)
            if len(parts) == 1:
                cut.append(hop)
                continue
            hop.close()
            cut.extend(self._hop(part) for part in parts)
        self._hops = cut

    def _hop(self, segment: RouteSegment) -> Hop:
        return Hop(segment, self.directory, self._max_length)

    async def hop_for(self, block: int, refusing: Collection[str], tokens: int) -> Hop:
        """The hop that computes `block`; for a gap, servers are chosen that are not `refusing`.

        Args:
            tokens: of all rows, that go through a new hop at once: the pass, and what was before.
        """
        found = [hop for hop in self._hops if hop.start <= block < hop.end]
        if not found:
            await self._fill_gap(block, refusing, Work(tokens, ANSWER_TOKENS))
            found = [hop for hop in self._hops if hop.start <= block < hop.end]
        return found[0]

    async def _fill_gap(self, block: int, refusing: Collection[str], work: Work) -> None:
        """Choose servers for the blocks around `block` that have none."""
        ends = [hop.end for hop in self._hops if hop.end <= block]
        start = max([0, *ends, *(other + 1 for other in self.absent if other < block)])
        starts = [hop.start for hop in self._hops if hop.start > block]
        last = self.directory.num_blocks
        end = min([last, *starts, *(other for other in self.absent if other > block)])
        for segment in await await_chain(self.directory, start, end, refusing, work):
            self._hops.extend(self._hop(part) for part in segment.cut(self._cuts))
        self._hops.sort(key=lambda hop: hop.start)

    async def catch_up(self, hop: Hop, history: History, times: list[HopTimes]) -> None:
        """Rebuild a hop's cache, if it is not what precedes the current pass.

        Args:
            history: what the cache is made of.
            times: gets those of what is replayed.
        """
        until, rows = history.current.position, history.current.rows
        hop.reserve(history.current.end)
        behind = 0 if hop.rows_version is None else history.rows_version - hop.rows_version
        if hop.goes_on_from(until, rows) and behind <= 1:
            return
        hop.reset()
        for part in history.replay(hop.start, hop.end, until):
            # Nothing is rebuilt from what the last block puts out.
            ends = hop.end == self.directory.num_blocks and hop.segment.span.shortens
            for start, end in itertools.pairwise(part.cuts(hop.start, hop.end)):
                last = 0 if ends and end == hop.end else None
                got, taken = await hop.run(history.request(start, end, part, last=last))
                times.append(taken)
            if not ends:
                history.learn(hop.end, part.position, got.states[hop.end - 1])

    async def settle(self, hops: Collection[Hop]) -> None:
        """Free those hops that wait for states which a lost server does not push."""
        waiting = [hop for hop in hops if hop.owes]
        work = [hop.settle() for hop in waiting]
        results = await asyncio.gather(*work, return_exceptions=True)
        for hop, error in zip(waiting, results, strict=True):
            if isinstance(error, RemoteError):
                # Perhaps for the lost one's sake: it is asked again, from the beginning.
                hop.reset()
            elif error is not None:
                raise error

    def drop(self, hop: Hop) -> None:
        """Leave a server that failed; its blocks are a gap then."""
        hop.close()
        self._hops.remove(hop)
        self.dropped += 1

    def close(self) -> None:
        for hop in self._hops:
            hop.close()
        self._hops = []
