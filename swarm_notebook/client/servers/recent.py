"""Who had which blocks lately, for words about those that nobody has now.

A peer that announces nothing for long is forgotten, so that a notebook that runs for weeks does not
grow.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from swarm_notebook.net.dht.records import ServerSpan, ServerState

# Longer than any restart, and than records of a dead server live (Petals': four minutes).
FORGET_SECONDS = 3600.0


@dataclass
class _LastSeen:
    """When a peer was announced last, by `time.monotonic`; its name, and the blocks it had."""

    when: float = 0.0
    name: str = ""
    blocks: set[int] = field(default_factory=set)


class RecentServers:
    """The peers that were announced within `FORGET_SECONDS`, or are still in use."""

    def __init__(self) -> None:
        self._seen: dict[str, _LastSeen] = {}

    def note(self, spans: Sequence[ServerSpan], now: float) -> None:
        """Who is announced with what at a moment of `time.monotonic`."""
        for span in spans:
            seen = self._seen.setdefault(span.peer, _LastSeen())
            seen.when, seen.name = now, span.name
            if span.info.state == ServerState.ONLINE:
                seen.blocks.update(range(span.start, span.end))

    def silent(self, now: float) -> list[str]:
        """The peers that were not announced for longer than `FORGET_SECONDS`."""
        return [peer for peer, seen in self._seen.items() if now - seen.when > FORGET_SECONDS]

    def forget(self, peer: str) -> None:
        self._seen.pop(peer, None)

    def holders(self, blocks: Collection[int]) -> tuple[str, ...]:
        """Names of those that had some of these blocks."""
        seen = [one for one in self._seen.values() if one.blocks.intersection(blocks)]
        return tuple(sorted({one.name for one in seen}))
