"""What the servers of a model announced, as far as readings of the DHT have found it. Pure code.

A reading may miss a record that is there (its keepers died or were slow), so a record is believed
until it expires. Of one server the newest record counts, also for the blocks that it has given up
since: their old records stay in the DHT for a while. Anybody can store *offline* in a server's
name: whatever its expiry, it is over as soon as the server is heard to announce itself again. A
record that is valid for longer than any server announces is none.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hivemind.utils import ValueWithExpiration, get_dht_time

from swarm_notebook.net.node import is_peer_id
from swarm_notebook.net.records import (
    MAX_SECONDS,
    MAX_SUBKEYS,
    ServerInfo,
    ServerState,
    parse_record,
)


@dataclass(frozen=True)
class _Record:
    """What a server announced, until when that holds (in the DHT's time), and when it was read."""

    info: ServerInfo
    expires: float
    read: float


class Announced:
    """The records under each block's key, by peer."""

    def __init__(self) -> None:
        self._blocks: dict[int, dict[str, _Record]] = {}

    def update(self, block: int, found: ValueWithExpiration | None, when: float = 0.0) -> None:
        """Take in what a reading found under a block's key; None or rubbish changes nothing.

        Args:
            when: of the reading, in seconds of Unix time, the same for all blocks; 0 is now.
        """
        now = get_dht_time()
        known = self._blocks.get(block, {})
        known = {peer: record for peer, record in known.items() if record.expires > now}
        entries = found.value if found is not None and isinstance(found.value, dict) else {}
        for peer, entry in itertools.islice(entries.items(), MAX_SUBKEYS):
            info = parse_record(entry.value)
            if info is None or not is_peer_id(peer) or entry.expiration_time > now + MAX_SECONDS:
                continue
            before = known.get(peer)
            if before is None or before.expires < entry.expiration_time:
                known[peer] = _Record(info, entry.expiration_time, when or time.time())
            elif before.expires == entry.expiration_time:
                known[peer] = replace(before, info=info)
        self._blocks[block] = known

    def holders(self) -> dict[int, dict[str, ServerInfo]]:
        """Who holds each block, with its newest record."""
        newest = self._newest()
        return {
            block: {peer: newest[peer].info for peer in known if _hosts(newest[peer].info, block)}
            for block, known in self._blocks.items()
        }

    def times(self) -> dict[str, float]:
        """When each server's newest record was first read, in seconds of Unix time."""
        return {peer: record.read for peer, record in self._newest().items()}

    def _newest(self) -> dict[str, _Record]:
        by_peer: dict[str, list[_Record]] = {}
        for known in self._blocks.values():
            for peer, record in known.items():
                by_peer.setdefault(peer, []).append(record)
        return {peer: _newest_of(records) for peer, records in by_peer.items()}


def _newest_of(records: Sequence[_Record]) -> _Record:
    newest = max(records, key=lambda record: record.expires)
    if newest.info.state != ServerState.OFFLINE:
        return newest
    later = [
        record
        for record in records
        if record.read > newest.read and record.info.state != ServerState.OFFLINE
    ]
    return max(later, key=lambda record: record.expires, default=newest)


def _hosts(info: ServerInfo, block: int) -> bool:
    start, end = info.start_block, info.end_block
    return start is None or end is None or start <= block < end
