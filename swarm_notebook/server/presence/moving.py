"""How a server goes to other blocks, as its memory and its address allow.

What it was lent holds its blocks and no more. So it keeps those that it has in both places, and
serves them all the time: another server of the same process takes them over, around the same
weights, and once that one serves, the memory of the others is free for the new ones. With these a
third one takes over in the same way. Each is another peer at another port: a server that is to be
found where it was leaves before it goes. So does one on a card, where blocks are captured in graphs
and compiled: beside another one that has not been tried. So does one that keeps no block, and where
some block has no server, as nobody could be served meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from swarm_notebook.server.loading.reading import Read
from swarm_notebook.server.options import ServeOptions
from swarm_notebook.server.presence.flow import Moves

_ANY_PORT = re.compile(r"/(tcp|udp)/0(/|$)")

Blocks = tuple[int, int]


@dataclass(frozen=True)
class Move:
    """What a server is to go on with.

    Attributes:
        options: what a server in that place is to be started with.
        known: where peers are, or were, that this one knows.
        kept: those of its blocks that this one has; None if there are none.
        beside: this one serves until that one does.
        goal: where that one is to go from there; None: it is there.
        hurry: some block has no server, so nobody can be served until that one is there.
    """

    options: ServeOptions
    known: Mapping[str, Sequence[str]]
    kept: Read | None = None
    beside: bool = False
    goal: Blocks | None = None
    hurry: bool = False


def moves_of(options: ServeOptions) -> Moves:
    """How a server moves; its device is known."""
    if not options.chosen:
        return Moves.NEVER
    found_again = options.identity is not None or options.swarm is not None
    if found_again or not all(map(_ANY_PORT.search, options.host_maddrs)):
        return Moves.AWAY
    return Moves.BESIDE if torch.device(options.device).type == "cpu" else Moves.AWAY


def common(blocks: Blocks, goal: Blocks) -> Blocks | None:
    """Those blocks that a server has in both places; None if there are none."""
    start, end = max(blocks[0], goal[0]), min(blocks[1], goal[1])
    return (start, end) if start < end else None
