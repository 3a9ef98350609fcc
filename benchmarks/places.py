"""How good the places are that servers choose by themselves, in swarms that come and go.

    make places      (python benchmarks/places.py [--seeds 4] [--limit 3] [--sizes 8 16 40])

Each trace is a seeded list of joins and leaves of unlike cards, with the memory and the speed that
`sn.plan` reckons with. After each event servers move until none wants to. What they have then is
the most tokens per second that can flow through all blocks, each token taking any servers, as a
part of what the best places of the same servers allow. That has a bound that is reckoned at once;
where none of the rules reaches it, a mixed integer program decides (HiGHS, over the starts of all
servers; where it runs out of time, its bound counts, so that the part is never too good).

The rule is the servers' own code (`server/presence/places.py`). Beside it are two others, written
from their descriptions:

- Petals [1]: a server takes the blocks with the least throughput, and moves when, after all others
  have moved as they would, the narrowest place were a third better.
- Parallax [2]: one scheduler knows all. It forms as many whole pipelines as the memory allows, of
  as few servers each as it can, shares the blocks of each by the servers' speed as far as their
  memory goes, and puts who is left where the least throughput is. Here it does that anew at every
  event, and a move costs it nothing.

[1] https://arxiv.org/abs/2312.08361, appendix; [2] https://arxiv.org/abs/2509.26182, section 3.2
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from swarm_notebook.planning.machines import KNOWN, Machine
from swarm_notebook.planning.placement import Share, prompt_seconds, weight_bytes
from swarm_notebook.planning.shape import BlockShape, ModelShape
from swarm_notebook.report.plot import Line, LineChart
from swarm_notebook.server.presence.flow import Moves, Place, bound, throughput
from swarm_notebook.server.presence.places import choose, next_move

# More moves than this after one event are an oscillation.
MOST_MOVES = 200
# Of the bound, from where on nobody asks for the exact optimum.
REACHED = 0.95
PETALS_BALANCE = 0.75  # its ``balance_quality``
CARDS = ("rtx3060", "rtx3090", "rtx4090", "a6000", "l4", "a100", "h100")
CACHE_PART, PROMPT_TOKENS = 0.2, 512
# Blocks, weights in the matrices of each, hidden size, bits: of a 70B and a 405B Llama.
SHAPES = {
    "70B": (80, 855_638_016, 8192, 4.5),
    "70B-bf16": (80, 855_638_016, 8192, 16.0),
    "405B": (126, 3_187_671_040, 16384, 4.5),
    "405B-bf16": (126, 3_187_671_040, 16384, 16.0),
}


@dataclass(frozen=True, order=True)
class Server:
    """A card that can hold `size` blocks, and passes `rate` tokens per second through one."""

    size: int
    rate: float

    def span_rate(self, blocks: int) -> float:
        """Tokens per second through a span; servers announce it for half of their blocks."""
        return self.rate / blocks

    def announced(self, blocks: int) -> float:
        """``throughput``, as Petals' servers announce it and reckon with it."""
        return self.rate * 2 / (blocks + 1)


Span = tuple[int, int]
Servers = Mapping[int, Server]
Spans = dict[int, Span]
# Changes the spans after one server has come or has left, until no server wants to move; how many
# have moved.
Rule = Callable[[Servers, Spans, int, random.Random], int]


def model_of(shape: str) -> ModelShape:
    blocks, weights, hidden, _ = SHAPES[shape]
    block = BlockShape(weights, 0, 2 * hidden, 2048)
    return ModelShape(shape, (block,) * blocks, hidden, 0, 0, None)


def servers_of(shape: str) -> tuple[int, list[Server]]:
    """How many blocks a model has, and what cards can do with it."""
    blocks, _, _, bits = SHAPES[shape]
    return blocks, [server_of(model_of(shape), KNOWN[name], bits) for name in CARDS]


@functools.cache
def server_of(model: ModelShape, card: Machine, bits: float) -> Server:
    size = int(card.room * (1 - CACHE_PART) / weight_bytes(model.blocks[0], card, bits))
    size = max(1, min(size, len(model.blocks)))
    seconds = prompt_seconds(model, Share(card, 0, 1, bits, 0, 0), PROMPT_TOKENS)
    return Server(size, round(PROMPT_TOKENS / seconds, 1))


def trace(seed: int, kinds: Sequence[Server], most: int) -> Iterator[tuple[int, Server | None]]:
    """Twice `most` events: a number and the server that joins, or None for the one that leaves."""
    drawn, there = random.Random(seed), []
    for number in range(2 * most):
        if there and drawn.random() < (0.15 if len(there) < most else 0.5):
            yield there.pop(drawn.randrange(len(there))), None
        else:
            there.append(number)
            yield number, drawn.choice(kinds)


def ours(
    servers: Servers, spans: Spans, blocks: int, drawn: random.Random, *, moves: Moves = Moves.AWAY
) -> int:
    """Each server decides alone, by the code that servers run.

    Args:
        moves: how all of them go to other blocks.
    """

    def place(one: int) -> Place:
        start, end = spans[one]
        return Place(start, end, servers[one].span_rate(end - start), moves)

    for new in servers.keys() - spans.keys():
        size = min(servers[new].size, blocks)
        rate = servers[new].span_rate(size)
        spans[new] = choose([place(one) for one in spans], blocks, size, rate)
    for moved in range(MOST_MOVES):
        move = next_move([place(one) for one in servers], blocks)
        if move is None:
            return moved
        # Of those that are alike one is as good as the other.
        one = drawn.choice([one for one in servers if place(one) == move[0]])
        spans[one] = move[1].start, move[1].end
    return MOST_MOVES


def petals(servers: Servers, spans: Spans, blocks: int, drawn: random.Random) -> int:
    """The least throughput first; a move when it helps although the others move, too."""
    for new in servers.keys() - spans.keys():
        spans[new] = _least(servers, spans, blocks, new)
    for moves in range(MOST_MOVES):
        order = list(servers)
        drawn.shuffle(order)
        for one in order:
            now = _throughputs(servers, spans, blocks).min()
            then = _throughputs(servers, _after_all(servers, spans, blocks, one, drawn), blocks)
            if now < PETALS_BALANCE * then.min():
                spans[one] = _least(servers, spans, blocks, one)
                break
        else:
            return moves
    return MOST_MOVES


def _after_all(
    servers: Servers, spans: Spans, blocks: int, first: int, drawn: random.Random
) -> Spans:
    """Where all would be if one moved, and the others for as long as any of them then wants to."""
    trial = dict(spans)
    trial[first] = _least(servers, trial, blocks, first)
    if trial[first] == spans[first]:
        return dict(spans)
    for _ in servers:
        before = dict(trial)
        for other in drawn.sample(list(servers), len(servers)):
            trial[other] = _least(servers, trial, blocks, other)
        if trial == before:
            break
    return trial


def _throughputs(servers: Servers, spans: Spans, blocks: int) -> np.ndarray:
    """Tokens per second through each block, as servers announce them."""
    rates = np.zeros(blocks)
    for one, (start, end) in spans.items():
        rates[start:end] += servers[one].announced(end - start)
    return rates


def _least(servers: Servers, spans: Spans, blocks: int, one: int) -> Span:
    """The span of a server's size with the least throughput without it."""
    others = {other: span for other, span in spans.items() if other != one}
    rates = _throughputs(servers, others, blocks)
    size = min(servers[one].size, blocks)
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(rates, size), axis=1)
    start = int(np.lexsort(windows.T[::-1])[0])
    return start, start + size


def parallax(servers: Servers, spans: Spans, blocks: int, _: random.Random) -> int:
    """All places anew, by one who knows all."""
    before = dict(spans)
    spans.clear()
    left = sorted(servers, key=lambda one: (-servers[one].size, -servers[one].rate))
    while sum(servers[one].size for one in left) >= blocks:
        pipeline, missing = [], blocks
        while missing > 0:
            # As few as possible: the largest, and at last the smallest that is enough.
            enough = [one for one in left if servers[one].size >= missing]
            one = enough[-1] if enough else left[0]
            left.remove(one)
            pipeline.append(one)
            missing -= servers[one].size
        start = 0
        for one, count in zip(
            pipeline, _by_speed([servers[x] for x in pipeline], blocks), strict=True
        ):
            spans[one] = start, start + count
            start += count
    for one in left:
        spans[one] = _least(servers, spans, blocks, one)
    return sum(before.get(one, span) != span for one, span in spans.items())


def _by_speed(pipeline: Sequence[Server], blocks: int) -> list[int]:
    """Blocks of each, in proportion to its speed and within its memory."""
    counts = [1] * len(pipeline)
    for _ in range(blocks - len(pipeline)):
        free = [one for one, server in enumerate(pipeline) if counts[one] < server.size]
        counts[min(free, key=lambda one: (counts[one] + 1) / pipeline[one].rate)] += 1
    return counts


RULES: dict[str, Rule] = {
    "ours": ours,
    "keeping": functools.partial(ours, moves=Moves.BESIDE),
    "petals": petals,
    "parallax": parallax,
}


def flow(servers: Servers, spans: Spans, blocks: int) -> float:
    """The most tokens per second that can flow through all blocks."""
    places = [Place(*spans[one], servers[one].span_rate(_length(spans[one]))) for one in servers]
    return throughput(places, blocks)


def _length(span: Span) -> int:
    return span[1] - span[0]


def at_most(servers: Servers, blocks: int) -> float:
    """A bound of it for any places."""
    return bound([Place(0, one.size, one.span_rate(one.size)) for one in servers.values()], blocks)


def optimum(servers: Servers, blocks: int, seconds: float) -> float:
    """The most with the best places, or a bound of it if `seconds` are not enough.

    Servers of a kind are alike, so how many of them begin at each block is all that is asked for.
    """
    kinds = sorted(set(servers.values()))
    counts = [sum(one == kind for one in servers.values()) for kind in kinds]
    begins = [
        (kind, start)
        for kind, server in enumerate(kinds)
        for start in range(blocks - min(server.size, blocks) + 1)
    ]
    shares = [
        (begin, block)
        for begin, (kind, start) in enumerate(begins)
        for block in range(start, start + min(kinds[kind].size, blocks))
    ]
    first, last = len(begins), len(begins) + len(shares)
    matrix = lil_matrix((blocks + len(begins) + len(kinds), last + 1))
    least, most = np.full(matrix.shape[0], -np.inf), np.zeros(matrix.shape[0])
    for column, (begin, block) in enumerate(shares, first):
        matrix[block, column] = -1
        matrix[blocks + begin, column] = 1
    matrix[:blocks, last] = 1
    for begin, (kind, _) in enumerate(begins):
        matrix[blocks + begin, begin] = -kinds[kind].rate
        matrix[blocks + len(begins) + kind, begin] = 1
    least[blocks + len(begins) :] = most[blocks + len(begins) :] = counts
    costs, whole = np.zeros(last + 1), np.zeros(last + 1)
    costs[last], whole[:first] = -1, 1
    found = milp(
        costs,
        constraints=LinearConstraint(matrix.tocsr(), least, most),
        integrality=whole,
        bounds=Bounds(0, np.inf),
        options={"time_limit": seconds, "mip_rel_gap": 0.01},
    )
    most = at_most(servers, blocks)
    return min(-found.mip_dual_bound, most) if found.mip_dual_bound is not None else most


def compare(
    seed: int, blocks: int, kinds: Sequence[Server], most: int, seconds: float, *, every: int
) -> dict[str, tuple[list[float], int]]:
    """By rule: parts of the optimum after every so many events of a trace, and all moves."""
    parts: dict[str, list[float]] = {name: [] for name in RULES}
    moves = dict.fromkeys(RULES, 0)
    spans: dict[str, Spans] = {name: {} for name in RULES}
    drawn = {name: random.Random(seed) for name in RULES}
    servers: dict[int, Server] = {}
    for event, (number, joined) in enumerate(trace(seed, kinds, most)):
        if joined is not None:
            servers[number] = joined
        else:
            del servers[number]
        for name, rule in RULES.items():
            if joined is None:
                del spans[name][number]
            moves[name] += rule(servers, spans[name], blocks, drawn[name])
        if event % every == every - 1 and (best := at_most(servers, blocks)):
            found = {name: flow(servers, spans[name], blocks) for name in RULES}
            if found["ours"] < REACHED * best:
                best = optimum(servers, blocks, seconds)
            for name in RULES:
                parts[name].append(found[name] / best)
    return {name: (parts[name], moves[name]) for name in RULES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--limit", type=float, default=3.0, help="seconds of one optimum")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 40])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["70B", "70B-bf16", "405B"])
    parser.add_argument("--picture", type=Path, help="where the curves are drawn")
    options = parser.parse_args()
    titles = [f"{name:>22}" for name in RULES]
    print("parts of the optimum: median / worst (moves per event)")
    print(f"{'blocks':10}{'servers':>8}{'seed':>5}", *titles)
    everything: dict[str, list[float]] = {name: [] for name in RULES}
    for shape in options.shapes:
        blocks, kinds = servers_of(shape)
        for most in options.sizes:
            for seed in range(options.seeds):
                found = compare(seed, blocks, kinds, most, options.limit, every=max(4, most // 4))
                cells = []
                for name, (parts, moves) in found.items():
                    everything[name] += parts
                    cells.append(f"{told(parts)} ({moves / (2 * most):4.1f})")
                print(f"{shape:10}{most:8}{seed:5}", *(f"{cell:>22}" for cell in cells), flush=True)
    print(f"{'all':23}", *(f"{told(parts):>22}" for parts in everything.values()))
    if options.picture:
        lines = [
            Line(name, [100 * rank / len(parts) for rank in range(len(parts))], sorted(parts))
            for name, parts in everything.items()
        ]
        axis = "moments in percent, from the worst to the best, of " + ", ".join(everything)
        LineChart("part of the optimum", axis, lines).save(options.picture)


def told(parts: Sequence[float]) -> str:
    """The median and the worst of some parts; none where no swarm could have all blocks."""
    return f"{statistics.median(parts):.3f} / {min(parts):.3f}" if parts else "none"


if __name__ == "__main__":
    main()
