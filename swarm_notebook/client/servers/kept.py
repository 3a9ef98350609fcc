"""A notebook keeps to its servers, and moves to better ones with a chance. Pure code.

How busy servers are is told with pings, so it is seconds old, and all notebooks hear the same. Had
each taken what is best by that, all would go where nobody was, find it busy, and go on together. So
whoever has servers expects that others move as well, until the new ones are as busy as those that
are left: what is not better then is not worth moving. And of all who think so, as many are to move
as gain by it: of those on one of two equal servers, each moves with a chance of a half. Who has the
servers to itself moves at once.

Servers compute together what goes through the same blocks. So a notebook that moves asks the busy
servers that it stays with for the same blocks as before. And which blocks a first chain takes of
which servers is decided without looking at others: all notebooks then cut at the same blocks. Only
then each chooses among servers that have the same blocks and are alike.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from swarm_notebook.client.servers.crowd import ALIKE, Crowd
from swarm_notebook.client.servers.routing import (
    Links,
    RouteSegment,
    best_chain,
    token_seconds,
)
from swarm_notebook.net.dht.records import ServerSpan, ServerState

# Once for every news: as often as `directory.py` asks how busy servers are.
DECIDE_SECONDS = 10.0


class KeptChain:
    """The servers that a notebook keeps to for single tokens.

    Args:
        crowd: how busy servers are for others.
        strange: whether audits are made, and none of a server has agreed with it yet.
        draw: a number from 0 to 1.
        clock: seconds.
    """

    def __init__(
        self,
        crowd: Crowd,
        strange: Callable[[ServerSpan], bool] = lambda _span: False,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._crowd, self._strange = crowd, strange
        self._draw, self._clock = draw, clock
        self._peers: dict[int, str] = {}  # by block
        self._decided = -math.inf

    def choose(
        self, spans: Sequence[ServerSpan], start: int, end: int, links: Links
    ) -> list[RouteSegment]:
        """The chain over blocks ``[start, end)``, which is kept from now on.

        Args:
            spans: what can be used of what the servers announce.
            links: how far they are; how busy they are is added here.

        Raises:
            MissingBlocks: no server covers some of the blocks.
        """
        kept, best, chance = self._considered(spans, start, end, links)
        chain = best if self._moves(chance) else kept
        for one in chain:
            self._peers.update(dict.fromkeys(range(one.start, one.end), one.peer))
        return chain

    def expected(
        self, spans: Sequence[ServerSpan], start: int, end: int, links: Links
    ) -> list[RouteSegment]:
        """The chain that `choose` would take, but for moves that are left to chance: none of those.

        Whoever only looks asks for this: it decides nothing, and two looks are the same.
        """
        kept, best, chance = self._considered(spans, start, end, links)
        return best if math.isinf(chance) else kept

    def _considered(
        self, spans: Sequence[ServerSpan], start: int, end: int, links: Links
    ) -> tuple[list[RouteSegment], list[RouteSegment], float]:
        """What is kept, or would be to begin with; what is better; the chance to move there."""
        usable = [span for span in spans if span.info.state == ServerState.ONLINE]
        kept = self._kept(start, end, usable)
        if not kept:
            kept = self._spread(best_chain(usable, start, end, links), usable, links)
        expected = self._when_shared(kept, usable, links)
        best = self._spread(best_chain(usable, start, end, expected), usable, expected)
        return kept, best, _chance(kept, best, expected)

    def _kept(self, start: int, end: int, usable: Sequence[ServerSpan]) -> list[RouteSegment]:
        """What is kept of these blocks; nothing unless all of it can be used."""
        chain: list[RouteSegment] = []
        for peer, run in itertools.groupby(range(start, end), self._peers.get):
            blocks = [*run]
            there = [one for one in usable if one.peer == peer]
            fits = [one for one in there if one.start <= blocks[0] and blocks[-1] < one.end]
            if not fits:
                return []
            chain.append(RouteSegment(fits[0], blocks[0], blocks[-1] + 1))
        return chain

    def _spread(
        self, chain: Sequence[RouteSegment], usable: Sequence[ServerSpan], links: Links
    ) -> list[RouteSegment]:
        """For each notebook another chain of servers that have the same blocks and are alike.

        Of those, one is taken whose answers were audited and found right. Strangers are taken where
        they are faster than that, and audited soon (`client.audit.choice`).
        """
        found = [*chain]
        for place in range(len(found)):
            alike = _alike(found, place, usable, links)
            known = [span for span in alike if not self._strange(span)] or alike
            by_peer = {span.peer: span for span in sorted(known, key=_speed)}
            mine = by_peer[self._crowd.one_of([*by_peer])]
            found[place] = replace(found[place], span=mine)
        return found

    def _when_shared(
        self, kept: Sequence[RouteSegment], usable: Sequence[ServerSpan], links: Links
    ) -> Links:
        """How busy servers are when others have moved to them from those that are kept."""
        rates = {one.peer: self._crowd.rate(one.peer) for one in usable}
        own = 1 / sum(token_seconds(kept, replace(links, busy=rates)))
        peers = Counter(one.peer for one in kept)
        busy = dict[str, float]()
        for span in usable:
            left = [
                rates[one.peer] for one in kept if one.start < span.end and span.start < one.end
            ]
            shared = (max(left, default=0.0) + rates[span.peer] - own) / 2
            stays = span.peer in peers
            busy[span.peer] = rates[span.peer] if stays else max(rates[span.peer], shared)
        bound = {
            one.peer: (one.start, one.end)
            for one in kept
            if rates[one.peer] and peers[one.peer] == 1
        }
        return replace(links, busy=busy, bound=bound)

    def _moves(self, chance: float) -> bool:
        if not chance or math.isinf(chance):
            return bool(chance)
        if self._clock() - self._decided < DECIDE_SECONDS:
            return False
        self._decided = self._clock()
        return self._draw() < chance


def _chance(kept: Sequence[RouteSegment], best: Sequence[RouteSegment], links: Links) -> float:
    """With which to move; infinite for who has the servers to itself."""
    left = [one for one in kept if one not in best]
    gain = sum(token_seconds(kept, links)) - sum(token_seconds(best, links))
    if not left or gain <= 0:
        return 0.0
    if not any(links.busy.get(one.peer) for one in (*left, *best)):
        return math.inf
    # As much as is gained of the part that would be another.
    each = zip(kept, token_seconds(kept, links), strict=True)
    return gain / sum(seconds for one, seconds in each if one in left)


def _speed(span: ServerSpan) -> tuple[float, str]:
    """Those that say that they are faster come first, and are taken by whoever is first."""
    return -(span.info.inference_rps or 0.0), span.peer


def _alike(
    chain: Sequence[RouteSegment], place: int, usable: Sequence[ServerSpan], links: Links
) -> list[ServerSpan]:
    """Who could have a segment of a chain, and would be no slower by more than `ALIKE` of it."""
    segment = chain[place]
    there = (segment.start, segment.end)
    most = ALIKE * (segment.end - segment.start) * links.block_seconds(segment.span)
    most += sum(token_seconds(chain, links))
    found = []
    for span in usable:
        if span.start <= segment.start and segment.end <= span.end:
            other = [*chain[:place], replace(segment, span=span), *chain[place + 1 :]]
            able = links.bound.get(span.peer, there) == there
            if able and sum(token_seconds(other, links)) <= most:
                found.append(span)
    return found
