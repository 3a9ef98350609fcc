"""Which server computes which blocks: the chain with the lowest expected latency. Pure code.

A token takes its blocks' time at the servers' announced speed, more where others are served at the
same time (`kept` says how many), and the network's time on the critical path: to the first server,
from each to the next, and back from the last. (Every server answers to the notebook besides, but
nobody waits for that.) Two servers that push to each other are half of their round trip apart,
which servers measure to their neighbours and announce. Where the notebook passes the hidden states
on, or no ping is known, the way over the notebook counts: half of its own round trip to each of the
two.

The best chain from `start` to `end` is found block by block: the cheapest way to have passed block
b on server s stays on s, or switches to it from whichever server is cheapest together with the
link; so the work is blocks x servers of a block, squared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from swarm_notebook.errors import MissingBlocks
from swarm_notebook.net.dht.records import ServerSpan, ServerState

# Of a server that was not reached yet, in seconds: across an ocean, so that a known one that is
# nearer comes first.
DEFAULT_RTT = 0.1
# Of a server that announces no speed, in tokens per second through one block: a slow processor.
DEFAULT_RPS = 100.0

# What one server more costs a token besides its way there, in seconds: taking the message apart,
# waiting for the torch thread, putting the answer together (measured: 0.9 + 0.6 ms on an H200).
HOP_SECONDS = 0.0015
# How long the answer to a prompt will be, nobody knows: as one in a chat.
ANSWER_TOKENS = 128
# How much faster another chain than that for a token must do some work to be taken for it: servers
# that are alike measure their long passes within that of each other on a busy machine, and a
# notebook that keeps to its chain is where `route` says that it is.
WORTH_ANOTHER = 2.0

Pushes = Callable[[ServerSpan, ServerSpan], bool]


@dataclass(frozen=True)
class RouteSegment:
    """Blocks ``[start, end)`` of a chain, on the server that announced `span`."""

    span: ServerSpan
    start: int
    end: int

    @property
    def peer(self) -> str:
        return self.span.peer

    def cut(self, boundaries: Iterable[int]) -> list[RouteSegment]:
        """The parts in which the server is asked, so that the states at `boundaries` are known.

        A server of ours gives states in between with one answer, and stays in one piece. One of
        Petals' gives the last block's alone; it takes any sub-range of its blocks.

        Args:
            boundaries: first blocks whose inputs are wanted, or given by a hook.
        """
        if self.span.extended:
            return [self]
        inside = {block for block in boundaries if self.start < block < self.end}
        bounds = [self.start, *sorted(inside), self.end]
        return [RouteSegment(self.span, *pair) for pair in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Work:
    """What a chain is to do.

    Attributes:
        prompt: tokens of all rows that go through at once.
        answer: tokens that follow one by one.
    """

    prompt: int = 0
    answer: int = 1

    @property
    def trips(self) -> int:
        """How often states travel along the chain."""
        return self.answer + (self.prompt > 0)

    def seconds(self, span: ServerSpan, step: float) -> float:
        """Expected seconds in one block of a server, where a step takes so many."""
        at_once = max(step, self.prompt / prompt_rps(span)) if self.prompt else 0.0
        return at_once + self.answer * step


ONE_TOKEN = Work()


@dataclass(frozen=True)
class Links:
    """How far the notebook and the servers are from each other.

    Attributes:
        rtt: round trips between notebook and servers that were measured here, in seconds by peer.
        pushes: whether the first of two servers can push its output to the second.
        busy: requests of others per second that a server is asked, by peer.
        bound: blocks through which a server is asked, or not at all, by peer.
    """

    rtt: Mapping[str, float]
    pushes: Pushes = lambda _sender, _receiver: False
    busy: Mapping[str, float] = field(default_factory=dict)
    bound: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def block_seconds(self, span: ServerSpan) -> float:
        """Expected seconds of one token in one block of a server, beside the tokens of others.

        What comes together shares a call. Each makes it longer, by what a token costs among many.
        (Had each counted as a step of its own, 50 notebooks on 16 simulated cards would have kept
        to servers that are slower, and had a third less.)
        """
        return block_seconds(span) + self._load(span) / prompt_rps(span)

    def wait_seconds(self, span: ServerSpan) -> float:
        """Expected seconds until a server begins with a token, for the calls of others.

        What comes during a call goes into the next, however many share it: at a server that is
        always busy one waits for half a call, for few blocks as for many.
        """
        return min(self._load(span), 1.0) / 2 * _call_seconds(span)

    def _load(self, span: ServerSpan) -> float:
        """How many requests of others a server has at a time (Little's law)."""
        return self.busy.get(span.peer, 0.0) * _call_seconds(span)

    def blocks(self, span: ServerSpan) -> tuple[int, int]:
        """The blocks through which a server can be asked."""
        return self.bound.get(span.peer, (span.start, span.end))

    def to_notebook(self, span: ServerSpan) -> float:
        """Seconds one way between the notebook and a server."""
        return self.rtt.get(span.peer, DEFAULT_RTT) / 2

    def between(self, sender: ServerSpan, receiver: ServerSpan) -> float:
        """Seconds from one server of a chain to the next."""
        if self.pushes(sender, receiver):
            # Either of them may have measured it.
            pings = [
                (one.info.next_pings or {}).get(other.peer)
                for one, other in ((sender, receiver), (receiver, sender))
            ]
            known = [ping for ping in pings if ping is not None]
            if known:
                return HOP_SECONDS + max(known) / 2
        return HOP_SECONDS + self.to_notebook(sender) + self.to_notebook(receiver)


def block_seconds(span: ServerSpan) -> float:
    """Expected seconds of one token in one block of this server."""
    return 1.0 / max(span.info.inference_rps or span.info.throughput or DEFAULT_RPS, 1e-3)


def _call_seconds(span: ServerSpan) -> float:
    return (span.end - span.start) * block_seconds(span)


def prompt_rps(span: ServerSpan) -> float:
    """Tokens per second through one block of this server when many go through it at once."""
    info = span.info
    return max(info.forward_rps or info.inference_rps or info.throughput or DEFAULT_RPS, 1e-3)


def prompt_seconds(segment: RouteSegment) -> float:
    """Expected seconds per token on this segment when many tokens go through it at once."""
    return (segment.end - segment.start) / prompt_rps(segment.span)


def network_seconds(chain: Sequence[RouteSegment], links: Links) -> list[float]:
    """Expected seconds on the network before each segment.

    Those of the last one include the way back, and so do those before blocks at home.
    """
    found = []
    for before, segment, behind in zip([None, *chain], chain, [*chain[1:], None], strict=False):
        if before is not None and before.end == segment.start:
            seconds = links.between(before.span, segment.span)
        else:
            seconds = links.to_notebook(segment.span)
        if behind is None or behind.start != segment.end:
            seconds += links.to_notebook(segment.span)
        found.append(seconds)
    return found


def token_seconds(chain: Sequence[RouteSegment], links: Links) -> list[float]:
    """Expected seconds of one token on each segment, network included."""
    return [
        network
        + links.wait_seconds(segment.span)
        + (segment.end - segment.start) * links.block_seconds(segment.span)
        for segment, network in zip(chain, network_seconds(chain, links), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Passed:
    """The cheapest known chain up to a block: its cost, its last segment, and what was before."""

    cost: float
    span: ServerSpan
    start: int
    before: _Passed | None


def best_chain(
    spans: Sequence[ServerSpan],
    start: int,
    end: int,
    links: Links,
    exclude: Collection[str] = (),
    *,
    work: Work = ONE_TOKEN,
    usual: list[RouteSegment] | None = None,
) -> list[RouteSegment]:
    """The chain over blocks ``[start, end)`` with the lowest expected seconds for some work.

    It is the chain for one token, unless another one does the work in half of the time.

    Args:
        spans: what the servers announce; only those online count.
        links: how far they are.
        exclude: peers that must not be used.
        work: what is asked for: a long prompt is best on other servers than a short one.
        usual: the chain that is taken for one token; None: the one with the lowest seconds.

    Raises:
        MissingBlocks: no server covers some of the blocks.
    """
    usable = [
        span for span in spans if span.info.state == ServerState.ONLINE and span.peer not in exclude
    ]
    missing = uncovered(usable, start, end)
    if missing:
        raise MissingBlocks(f"no server holds {describe_blocks(missing)}")
    if usual is None:
        usual = _cheapest(usable, start, end, links, ONE_TOKEN)
    if work == ONE_TOKEN:
        return usual
    special = _cheapest(usable, start, end, links, work)
    much = WORTH_ANOTHER * work_seconds(special, links, work) < work_seconds(usual, links, work)
    return special if much else usual


def work_seconds(chain: Sequence[RouteSegment], links: Links, work: Work) -> float:
    """Expected seconds of some work on a chain, network included."""
    blocks = [
        (one.end - one.start) * work.seconds(one.span, links.block_seconds(one.span))
        + work.trips * links.wait_seconds(one.span)
        for one in chain
    ]
    return sum(blocks) + work.trips * sum(network_seconds(chain, links))


def _cheapest(
    usable: Sequence[ServerSpan], start: int, end: int, links: Links, work: Work
) -> list[RouteSegment]:
    """The chain with the lowest expected seconds, of servers that cover all blocks."""
    distances: dict[tuple[int, int], float] = {}
    waits = [work.trips * links.wait_seconds(span) for span in usable]
    seconds = [work.seconds(span, links.block_seconds(span)) for span in usable]
    ranges = [links.blocks(span) for span in usable]

    def distance(sender: int, receiver: int) -> float:
        pair = (sender, receiver)
        if pair not in distances:
            there = work.trips * links.between(usable[sender], usable[receiver])
            distances[pair] = there + waits[receiver]
        return distances[pair]

    passed: dict[int, _Passed] = {}  # by the server, as a number in `usable`, of the latest block
    for block in range(start, end):
        # Who is bound to a range is left at its end and not before.
        left = {
            number: before
            for number, before in passed.items()
            if usable[number].peer not in links.bound or ranges[number][1] == block
        }
        following: dict[int, _Passed] = {}
        for number, span in enumerate(usable):
            first, behind = ranges[number]
            if not first <= block < behind:
                continue
            best = passed.get(number)
            if block == start:
                cost = work.trips * links.to_notebook(span) + waits[number]
                best = _Passed(cost, span, block, None)
            elif block == first or span.peer not in links.bound:
                others = left.keys() - {number}
                found = min(
                    ((left[one].cost + distance(one, number), one) for one in others), default=None
                )
                if found is not None and (best is None or found[0] < best.cost):
                    best = _Passed(found[0], span, block, left[found[1]])
            if best is not None:
                after = best.cost + seconds[number]
                following[number] = _Passed(after, span, best.start, best.before)
        passed = following
    last = min(
        passed.values(),
        key=lambda one: one.cost + work.trips * links.to_notebook(one.span),
        default=None,
    )
    return _segments(last, end)


def _segments(last: _Passed | None, end: int) -> list[RouteSegment]:
    """The chain that has passed all blocks."""
    chain: list[RouteSegment] = []
    while last is not None:
        chain.insert(0, RouteSegment(last.span, last.start, chain[0].start if chain else end))
        last = last.before
    return chain


def stretches(num_blocks: int, home: Collection[int]) -> list[tuple[int, int]]:
    """The ranges ``[start, end)`` of blocks between those at home."""
    cuts = [-1, *sorted(home), num_blocks]
    ranges = [(before + 1, after) for before, after in itertools.pairwise(cuts)]
    return [(start, end) for start, end in ranges if start < end]


def uncovered(spans: Sequence[ServerSpan], start: int, end: int) -> list[int]:
    """The blocks of ``[start, end)`` that none of the spans covers."""
    covered = {block for span in spans for block in range(span.start, span.end)}
    return [block for block in range(start, end) if block not in covered]


def block_runs(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Runs ``[start, end)`` of neighbouring numbers."""
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        start = runs.pop()[0] if runs and runs[-1][1] == block else block
        runs.append((start, block + 1))
    return runs


def block_slices(blocks: Iterable[int]) -> str:
    """Block numbers, runs of them as slices: ``0:15, 20, 22``."""
    runs = block_runs(blocks)
    return ", ".join(f"{first}" if last == first + 1 else f"{first}:{last}" for first, last in runs)


def describe_blocks(blocks: Sequence[int]) -> str:
    """A list of blocks for people: ``block 3`` or ``blocks 0:15, 20:22``."""
    return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {block_slices(blocks)}"
