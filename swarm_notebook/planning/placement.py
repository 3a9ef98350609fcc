"""Which machine gets which blocks, and how long a token takes then; pure arithmetic.

A token's time is a sum: each machine reads the weights of its blocks once per step (and the keys
and values of its sessions), the blocks cost something each, the states travel from hop to hop, and
the notebook multiplies by the head. So for one stream as many blocks as possible belong on the
machines that are fastest per block, and no machine without need: every hop costs. `place` finds the
best cut of the blocks, exactly, for machines in the order of their speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from swarm_notebook.planning.machines import Link, Machine
from swarm_notebook.planning.shape import BlockShape, ModelShape

# What a hop costs a token beside the network and its blocks; what the notebook does in Python, for
# each token and for each block of it: tiny Llamas of 5 and 30 blocks over a server on a core of an
# AMD EPYC (queue 0.3, serialisation 0.5, transport 0.6 ms; notebook 1.65 and 2.65 ms).
HOP_SECONDS, NOTEBOOK_SECONDS, NOTEBOOK_BLOCK_SECONDS = 0.0014, 0.00145, 0.00004
# Bytes of a request or an answer beside the hidden states.
FRAME_BYTES = 200
# The part of the bandwidth that products with packed weights reach. By kernels of our own 32
# compiled blocks of 3.95 GB take 2.80 ms on an H200. On a Mac they are unpacked for each product,
# which took a hundred times as long on an H100. On a core of an AMD EPYC that reads float32 at
# 12 GB/s, those of the demo model's blocks reach 5 in bfloat16 (1.7 ms), and as much in 4 bits
# (0.7 ms).
PACKED_REACHED = {"gpu": 0.85, "mac": 0.01, "cpu": 0.4}
# On a card each further row costs such kernels arithmetic, at this part of that of floats: 32 rows
# take 6.3 to 6.6 ms there. From where unpacking costs less, it is unpacked, which is another read.
PACKED_ARITHMETIC = 0.26


@dataclass(frozen=True)
class Demand:
    """What is to run at the same time.

    Attributes:
        context: positions of a session.
        sessions: how many there is room for.
    """

    context: int
    sessions: int


@dataclass(frozen=True)
class Share:
    """Blocks ``[start, end)`` on one machine, their weights at ``bits``."""

    machine: Machine
    start: int
    end: int
    bits: float
    weights: int
    cache: int

    @property
    def memory(self) -> int:
        return self.weights + self.cache


def weight_bytes(block: BlockShape, machine: Machine, bits: float) -> float:
    """Bytes of a block's weights on a machine."""
    return block.matrices * bits / 8 + block.vectors * machine.float_bits / 8


def cache_bytes(block: BlockShape, machine: Machine) -> float:
    """Bytes of a block's keys and values, per position."""
    return block.cache * machine.float_bits / 8


def step_seconds(
    shape: ModelShape, share: Share, rows: int, context: int, blocks: Sequence[BlockShape] | None
) -> float:
    """Seconds of a step of so many rows through the blocks of a share, ``context`` behind each."""
    machine = share.machine
    found = shape.blocks[share.start : share.end] if blocks is None else blocks
    packed = share.bits < machine.float_bits
    reached = machine.reached * (PACKED_REACHED[machine.kind] if packed else 1.0)
    seconds = 0.0
    for block in found:
        weights = shape.read(block, rows) * share.bits / 8 + block.vectors * machine.float_bits / 8
        reading = weights / (machine.bandwidth * reached)
        arithmetic = 2 * shape.multiplied(block) * rows / machine.operations
        kept = rows * context * cache_bytes(block, machine) / machine.bandwidth
        seconds += max(reading, arithmetic) + kept + machine.block_seconds
        if packed and machine.kind == "gpu":
            floats = shape.read(block, rows) * machine.float_bits / 8
            unpacked = floats / (machine.bandwidth * machine.reached)
            seconds += min((rows - 1) * arithmetic / rows / PACKED_ARITHMETIC, unpacked)
    return seconds


def prompt_seconds(shape: ModelShape, share: Share, tokens: int) -> float:
    """Seconds of a prompt through the blocks of a share.

    Attention counts as both of its products with what precedes a token, half of all positions on
    average, by queries as wide as the states. A block of the demo model against what the products
    of a wider one reach on the same core, planned by measured processor time: 1.02, 1.11, 1.10 and
    1.01 for 128 to 1,024 tokens; without attention 1.00, 1.06, 1.02 and 0.86.
    """
    blocks = shape.blocks[share.start : share.end]
    arithmetic = 2 * tokens * sum(shape.multiplied(block) for block in blocks)
    arithmetic += 2 * tokens**2 * shape.hidden_size * len(blocks)
    at_least = step_seconds(shape, share, 1, 0, None)
    return max(at_least, arithmetic / share.machine.operations)


def hop_seconds(shape: ModelShape, link: Link, tokens: int) -> float:
    """Seconds until the states of so many tokens are at the next machine."""
    return HOP_SECONDS + link.one_way(FRAME_BYTES + tokens * shape.hidden_size * 4)


def notebook_seconds(shape: ModelShape, notebook: Machine, link: Link) -> float:
    """Seconds per token in the notebook, with the way back to it."""
    head = shape.head * notebook.float_bits / 8 / (notebook.bandwidth * notebook.reached)
    back = link.one_way(FRAME_BYTES + shape.hidden_size * 4)
    return NOTEBOOK_SECONDS + len(shape.blocks) * NOTEBOOK_BLOCK_SECONDS + head + back


def edge_bytes(shape: ModelShape, notebook: Machine) -> int:
    """What the notebook itself keeps: embeddings, final norm, head."""
    return int(shape.edges * notebook.float_bits / 8)


def place(
    shape: ModelShape,
    machines: Sequence[Machine],
    demand: Demand,
    link: Link,
    *,
    bits: Sequence[float],
    taken: Sequence[int],
) -> list[Share] | None:
    """The shares with which one stream is fastest; None if the blocks do not fit.

    Args:
        bits: per weight, on each machine.
        taken: bytes that are not free on each machine, beside what a server takes.
    """
    count = len(shape.blocks)
    positions = demand.context * demand.sessions
    hop = hop_seconds(shape, link, 1)
    costs = []
    for machine, wanted in zip(machines, bits, strict=True):
        share = Share(machine, 0, count, wanted, 0, 0)
        seconds = [
            step_seconds(shape, share, 1, demand.context // 2, [block]) for block in shape.blocks
        ]
        weights = [weight_bytes(block, machine, wanted) for block in shape.blocks]
        cache = [positions * cache_bytes(block, machine) for block in shape.blocks]
        costs.append([list(accumulate(row, initial=0.0)) for row in (seconds, weights, cache)])
    order = sorted(range(len(machines)), key=lambda index: costs[index][0][-1])
    # best[b]: the least seconds of blocks 0 to b-1 on the machines so far, and who ends where.
    best: list[tuple[float, tuple[tuple[int, int, int], ...]]] = [(math.inf, ())] * (count + 1)
    best[0] = 0.0, ()
    for index in order:
        seconds, weights, cache = costs[index]
        room = machines[index].room - taken[index]
        after = list(best)
        start = 0
        for end in range(1, count + 1):
            while start < end and weights[end] - weights[start] + cache[end] - cache[start] > room:
                start += 1
            for begin in range(start, end):
                total = best[begin][0] + seconds[end] - seconds[begin] + hop
                if total < after[end][0]:
                    after[end] = total, (*best[begin][1], (index, begin, end))
        best = after
    if math.isinf(best[count][0]):
        return None
    return [
        Share(
            machines[index],
            begin,
            end,
            bits[index],
            int(costs[index][1][end] - costs[index][1][begin]),
            int(costs[index][2][end] - costs[index][2][begin]),
        )
        for index, begin, end in best[count][1]
    ]


def fitting_blocks(
    shape: ModelShape,
    machines: Sequence[Machine],
    demand: Demand,
    bits: Sequence[float],
    taken: Sequence[int],
) -> int:
    """How many blocks, from the first on, fit on all machines together."""
    positions = demand.context * demand.sessions
    index = 0
    for machine, wanted, used in zip(machines, bits, taken, strict=True):
        room = float(machine.room - used)
        while index < len(shape.blocks):
            block = shape.blocks[index]
            size = weight_bytes(block, machine, wanted) + positions * cache_bytes(block, machine)
            if size > room:
                break
            room -= size
            index += 1
    return index


def token_parts(
    shape: ModelShape, shares: Sequence[Share], notebook: Machine, demand: Demand, link: Link
) -> dict[str, float]:
    """Seconds of one stream's token, by where they are spent; names are for people."""
    parts: dict[str, float] = {}
    for share in shares:
        name = f"blocks {share.start}:{share.end} on {share.machine.name}"
        parts[name] = step_seconds(shape, share, 1, demand.context // 2, None)
    parts["network"] = len(shares) * hop_seconds(shape, link, 1)
    parts["the notebook"] = notebook_seconds(shape, notebook, link)
    return parts
