"""Which server computes which blocks: the chain with the lowest expected latency. Pure code.

A hop costs one round trip from the notebook plus its blocks' time at the server's announced
speed. The best chain from `start` to `end` is found block by block: the cheapest way to have
passed block b on server s either stays on s or switches to it, so the work is blocks x servers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from swarm_notebook.errors import MissingBlocks
from swarm_notebook.net.records import ServerSpan, ServerState

DEFAULT_RTT = 0.1
DEFAULT_RPS = 100.0


@dataclass(frozen=True)
class RouteSegment:
    """Blocks ``[start, end)`` of a chain, on the server that announced `span`."""

    span: ServerSpan
    start: int
    end: int

    @property
    def peer(self) -> str:
        return self.span.peer


def block_seconds(span: ServerSpan) -> float:
    """Expected seconds of one token in one block of this server."""
    return 1.0 / max(span.info.inference_rps or span.info.throughput or DEFAULT_RPS, 1e-3)


def prompt_seconds(segment: RouteSegment) -> float:
    """Expected seconds per token on this segment when many tokens go through it at once."""
    info = segment.span.info
    rate = info.forward_rps or info.inference_rps or info.throughput or DEFAULT_RPS
    return (segment.end - segment.start) / max(rate, 1e-3)


def segment_seconds(segment: RouteSegment, rtt: Mapping[str, float]) -> float:
    """Expected seconds of one token on this segment, its round trip included."""
    trip = rtt.get(segment.peer, DEFAULT_RTT)
    return trip + (segment.end - segment.start) * block_seconds(segment.span)


def best_chain(
    spans: Sequence[ServerSpan],
    start: int,
    end: int,
    rtt: Mapping[str, float],
    exclude: Collection[str] = (),
) -> list[RouteSegment]:
    """The chain over blocks ``[start, end)`` with the lowest expected seconds per token.

    Args:
        spans: what the servers announce; only those online count.
        rtt: measured round trip in seconds per peer.
        exclude: peers that must not be used.

    Raises:
        MissingBlocks: no server covers some of the blocks.
    """
    usable = [
        span for span in spans if span.info.state == ServerState.ONLINE and span.peer not in exclude
    ]
    missing = uncovered(usable, start, end)
    if missing:
        raise MissingBlocks(f"no server holds {describe_blocks(missing)}")

    # cost and the chain of servers so far, per server that computes the current block
    ways: dict[int, tuple[float, list[RouteSegment]]] = {}
    for block in range(start, end):
        before = min(ways.values(), key=lambda way: way[0], default=(0.0, []))
        following: dict[int, tuple[float, list[RouteSegment]]] = {}
        for number, span in enumerate(usable):
            if not span.start <= block < span.end:
                continue
            switch = before[0] + rtt.get(span.peer, DEFAULT_RTT)
            stay = ways.get(number)
            if stay is not None and stay[0] <= switch:
                last = stay[1][-1]
                chain = [*stay[1][:-1], RouteSegment(span, last.start, block + 1)]
                cost = stay[0]
            else:
                chain = [*before[1], RouteSegment(span, block, block + 1)]
                cost = switch
            following[number] = (cost + block_seconds(span), chain)
        ways = following
    return min(ways.values(), key=lambda way: way[0], default=(0.0, []))[1]


def uncovered(spans: Sequence[ServerSpan], start: int, end: int) -> list[int]:
    """The blocks of ``[start, end)`` that none of the spans covers."""
    covered = {block for span in spans for block in range(span.start, span.end)}
    return [block for block in range(start, end) if block not in covered]


def describe_blocks(blocks: Sequence[int]) -> str:
    """A list of blocks for people: ``block 3`` or ``blocks 0:15, 20:22``."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][1] == block:
            runs[-1][1] = block + 1
        else:
            runs.append([block, block + 1])
    if len(runs) == 1 and runs[0][1] - runs[0][0] == 1:
        return f"block {runs[0][0]}"
    return "blocks " + ", ".join(f"{first}:{last}" for first, last in runs)
