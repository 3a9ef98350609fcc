"""What readers in other threads are shown of the servers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from swarm_notebook.net.dht.records import ServerSpan


@dataclass(frozen=True)
class Snapshot:
    """What was known at one moment; replaced as a whole, never changed.

    Attributes:
        when: the moment, in seconds of Unix time.
        announced: when a server's present record was first read, by peer.
        others: servers with another checkpoint than the notebook's, and what that means, by peer.
    """

    spans: tuple[ServerSpan, ...] = ()
    when: float = 0.0
    announced: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shortage:
    """Blocks that a call waits for, because no server holds them.

    Attributes:
        blocks: which, in words.
        had: names of those that held them until now.
        since: when the call began to wait, in seconds of Unix time.
        limit: seconds after which it gives up.
    """

    blocks: str
    had: tuple[str, ...]
    since: float
    limit: float
