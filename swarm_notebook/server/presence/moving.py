"""How a server goes to other blocks, as its memory and its address allow.

Where memory for as many blocks more is free, another server of the same process is started at the
other blocks and takes over when it serves, so that nothing is missing meanwhile. It is another peer
at another port: a server that is to be found where it was leaves before it goes. So does one on a
card, where blocks are captured in graphs and compiled: beside another one that has not been tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swarm_notebook.server.engine.quantising.loading import free_memory
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.loading.room import FREE_PART
from swarm_notebook.server.options import ServeOptions
from swarm_notebook.server.presence.flow import Moves

_ANY_PORT = re.compile(r"/(tcp|udp)/0(/|$)")


@dataclass(frozen=True)
class Move:
    """Where a server had better be.

    Attributes:
        options: what a server in that place is to be started with.
        beside: it is to be started before this one leaves.
        known: where peers are, or were, that this one knows.
    """

    options: ServeOptions
    beside: bool
    known: Mapping[str, Sequence[str]]


def moves_of(options: ServeOptions, span: Span) -> Moves:
    """How a server with these blocks moves just now."""
    if not options.chosen:
        return Moves.NEVER
    found_again = options.identity is not None or options.swarm is not None
    if found_again or not all(map(_ANY_PORT.search, options.host_maddrs)):
        return Moves.AWAY
    if span.device.type != "cpu":
        return Moves.AWAY
    taken = sum(
        one.nbytes for layer in span.layers for one in (*layer.parameters(), *layer.buffers())
    )
    return Moves.BESIDE if taken <= FREE_PART * free_memory(span.device) else Moves.AWAY
