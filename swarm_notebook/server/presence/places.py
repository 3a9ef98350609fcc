"""Which blocks a server takes when nobody has told it, and when it had better move: pure decisions.

A swarm that nobody coordinates: each server reads what the others announce and takes the span that
lifts the swarm most. First come blocks that nobody has, then what can flow through all blocks
(`flow`), then the number of hops that one stream needs, as each costs.

What the servers that are there could have at most is known, so nobody moves while the swarm has
nearly that. If not, all reckon out the same moves, from the same records, and whose turn it is
makes the first of them. A single move often helps little, and the least rate of all blocks not at
all while two of them are slow: moves are chosen by how much of the demand is met, where as much is
asked of every block as the servers could give at most [1]. Where no move helps, the servers go to
one of the arrangements that depend on nothing but themselves.

No block of a swarm that is whole ever loses its last server by a move. `benchmarks/places.py`
compares all this with the optimum, and with what others do.

[1] Petals' servers maximise the rates by blocks, the least first:
    https://arxiv.org/abs/2312.08361, section 3.3 and appendix
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from swarm_notebook.server.presence.flow import (
    Moves,
    Place,
    bound,
    held,
    layouts,
    throughput,
    unmet,
)

# How much more the swarm must be able to have for anybody to move. In simulated swarms of up to
# eight unlike cards, six traces: all of the optimum in the median with 1.02, 1.05 and 1.1, and 0.98
# with 1.15; of a hundred looks at rates that are measured 3 % apart, somebody moved after 9, 2, 1
# and 1. With 1.02 servers that keep blocks went round and round in one of 16 traces.
WORTH_MOVING = 1.05
# What moves must lead to, as a part of what the servers could have; with less, the servers go on to
# another arrangement from there.
ENOUGH = 0.98
# Of what servers could have: with less, who makes the swarm whole looks for a way around.
# In larger swarms somebody is free to move, and to try all ways takes long.
POOR, MOST_TRIED = 0.85, 32
# What is asked for where no move helps to all that servers could have, by what they have.
_MORE = (1.5, 1.25, 1.1)
# Of what servers could give at most where they cannot have all blocks: hardly anything is asked of
# each block, so that all that counts is that somebody has it.
_HARDLY = 1e-3

Move = tuple[Place, Place]


def choose(others: Sequence[Place], blocks: int, size: int, rate: float) -> tuple[int, int]:
    """The span ``(start, end)`` of ``size`` blocks with which a swarm is worth most.

    Args:
        others: the servers that are there.
        blocks: how many the model has.
        size: how many this server can hold, at least one.
        rate: tokens per second that it passes through a span of them.
    """
    own = Place(0, min(size, blocks), rate)
    asked = _asked([*others, own], blocks)

    def worth(start: int) -> tuple[int, float, int, int]:
        places = [*others, own.at(start)]
        covered, missing = _worth(places, blocks, asked)
        return covered, round(missing / asked, 6), -_hops(places, blocks), -start

    start = max(range(blocks - own.size + 1), key=worth)
    whole = all(held([*others, own.at(start)], blocks))
    if whole and not all(held(others, blocks)) and len(others) < MOST_TRIED:
        start = _unlocked(others, blocks, own.at(start))
    return start, start + own.size


def _unlocked(others: Sequence[Place], blocks: int, own: Place) -> int:
    """Where a server is to begin that makes the swarm whole at `own`; there, mostly.

    When it is whole, a block that one server has alone ties it down, and where there is hardly more
    room than blocks all may be tied to poor places for good. While blocks are missing they may go
    anywhere: one that begins where others are lets these go to what is missing.
    """
    most = bound([*others, own], blocks)

    def end(start: int) -> tuple[bool, int, float]:
        """Whether that is enough, minus the moves until the swarm is whole, and what flows then."""
        places, moves, missing = [*others, own.at(start)], 0, 0
        while moves < 2 * len(places) and (move := next_move(places, blocks)) is not None:
            missing += not all(held(places, blocks))
            places.remove(move[0])
            places.append(move[1])
            moves += 1
        reached = throughput(places, blocks)
        return reached >= POOR * most, -missing, reached

    if end(own.start)[0]:
        return own.start
    edges = {0, blocks, *(one.start for one in others), *(one.end for one in others)}
    starts = {start for edge in edges for start in (edge, edge - own.size)}
    ends = {start: end(start) for start in sorted(starts) if 0 <= start <= blocks - own.size}
    best = max(ends, key=lambda start: ends[start])
    return best if ends[best][0] else own.start


def better(others: Sequence[Place], blocks: int, own: Place) -> tuple[int, int] | None:
    """Where a server had better be than where it is; None if it should stay.

    Args:
        others: the servers that are there besides it, and can be reckoned with.
        own: where it is.
    """
    move = next_move([*others, own], blocks)
    if move is None or move[0] != own:
        return None
    return move[1].start, move[1].end


def next_move(places: Sequence[Place], blocks: int) -> Move | None:
    """The server whose turn it is to move, and where it goes; None if all should stay."""
    places = sorted(places)
    covered, flow = sum(map(bool, held(places, blocks))), throughput(places, blocks)
    if flow * WORTH_MOVING >= bound(places, blocks) > 0:
        return None
    arranged = layouts(places, blocks)
    if not arranged:
        moves, end = _helpful_moves(places, blocks, _asked(places, blocks))
        return moves[0] if moves and sum(map(bool, held(end, blocks))) > covered else None
    most = arranged[0][0]
    if flow * WORTH_MOVING >= most:
        return None
    tried = [_helpful_moves(places, blocks, part * most) for part in (1, ENOUGH)]
    helpful = [(throughput(end, blocks), moves) for moves, end in tried if moves]
    ways = [moves for reached, moves in helpful if reached >= ENOUGH * most]
    for reached, wanted in arranged:
        far = (Counter(places) - Counter(wanted)).total()
        if reached > flow * WORTH_MOVING and all(far < len(moves) for moves in ways):
            moves = _moves_to(wanted, places, blocks, most)
            ways += [moves] if moves else []
    if ways:
        return min(ways, key=len)[0]
    # Not what could be, but more than there is: nearly nothing helps to all of it where several
    # places are narrow, but it may help the narrowest.
    if max(helpful, default=(0.0, []))[0] <= flow * WORTH_MOVING:
        tried = [_helpful_moves(places, blocks, part * flow) for part in _MORE]
        helpful = [(throughput(end, blocks), moves) for moves, end in tried if moves]
    best, moves = max(helpful, default=(0.0, []))
    return moves[0] if best > flow * WORTH_MOVING else None


def _helpful_moves(
    places: Sequence[Place], blocks: int, asked: float
) -> tuple[list[Move], list[Place]]:
    """Moves of which each helps most, until all that is asked is met or none helps; their end."""
    now, moves = list(places), list[Move]()
    while len(moves) < 2 * len(places) and any(unmet(now, blocks, asked)):
        best, move = _worth(now, blocks, asked), None
        counts = held(now, blocks)
        for place in sorted(set(now)):
            if not _may_move(place, counts):
                continue
            rest = [*now]
            rest.remove(place)
            for start in _starts(rest, blocks, place.size, unmet(rest, blocks, asked)):
                if not _may_move(place, counts, start):
                    continue
                found = _worth([*rest, place.at(start)], blocks, asked)
                # Not for what rounding makes of it.
                if found[0] > best[0] or (found[0] == best[0] and found[1] > best[1] + asked / 1e4):
                    best, move = found, (place, place.at(start))
        if move is None:
            break
        moves.append(move)
        now.remove(move[0])
        now = sorted([*now, move[1]])
    return moves, now


def _moves_to(
    wanted: Sequence[Place], places: Sequence[Place], blocks: int, asked: float
) -> list[Move]:
    """The moves that lead to an arrangement, the least harmful first; none if some block is in the
    way: nobody else has it.
    """
    now, moves = list(places), list[Move]()
    moving = [*(Counter(places) - Counter(wanted)).elements()]
    left = [*(Counter(wanted) - Counter(places)).elements()]
    while moving:
        counts = held(now, blocks)
        best: tuple[tuple[int, float], Move] | None = None
        for place in sorted(set(moving)):
            rest = [*now]
            rest.remove(place)
            for there in sorted({one for one in left if one == place.at(one.start)}):
                if not _may_move(place, counts, there.start):
                    continue
                found = _worth([*rest, there], blocks, asked)
                if best is None or found > best[0]:
                    best = found, (place, there)
        if best is None:
            return []
        place, there = best[1]
        moves.append(best[1])
        moving.remove(place)
        left.remove(there)
        now.remove(place)
        now.append(there)
    return moves


def _asked(places: Sequence[Place], blocks: int) -> float:
    """Tokens per second that are asked of every block, to compare places by what is met."""
    return bound(places, blocks) or _HARDLY * min((place.rate for place in places), default=1.0)


def _worth(places: Sequence[Place], blocks: int, asked: float) -> tuple[int, float]:
    """Blocks that somebody has, and minus what is missing of all that is asked."""
    return sum(map(bool, held(places, blocks))), -sum(unmet(places, blocks, asked))


def _may_move(place: Place, counts: Sequence[int], start: int | None = None) -> bool:
    """Whether a server may move: the blocks that it leaves have others, or the swarm is not whole.

    Args:
        counts: how many servers each block has.
        start: of where it goes; None: anywhere.
    """
    if place.moves is Moves.NEVER or not all(counts):
        return place.moves is not Moves.NEVER
    left = set(range(place.start, place.end))
    if place.moves is Moves.BESIDE:
        # What it has in both places it serves all the time; anywhere: a block further at least.
        if start is None:
            return counts[place.start] > 1 or counts[place.end - 1] > 1
        left -= set(range(start, start + place.size))
    return all(counts[block] > 1 for block in left)


def _starts(others: Sequence[Place], blocks: int, size: int, missing: Sequence[float]) -> list[int]:
    """Where a server could help: at the edges of others, or of what is missing without it."""
    edges = {0, blocks, *(one.start for one in others), *(one.end for one in others)}
    for block, (before, here) in enumerate(zip([0.0, *missing], [*missing, 0.0], strict=True)):
        if bool(before) != bool(here):
            edges.add(block)
    starts = {start for edge in edges for start in (edge, edge - size)}
    return sorted(
        start
        for start in starts
        if 0 <= start <= blocks - size and any(missing[start : start + size])
    )


def _hops(places: Sequence[Place], blocks: int) -> int:
    """The fewest servers that a stream through all blocks that somebody has takes."""
    hops, block = 0, 0
    while block < blocks:
        ends = [place.end for place in places if place.start <= block < place.end]
        hops += bool(ends)
        block = max(ends, default=block + 1)
    return hops
