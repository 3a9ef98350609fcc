"""What the servers of a model announced, as far as readings of the DHT have found it. Pure code.

A reading may miss a record that is there (its keepers died or were slow), so a record is believed
until it expires. Of one server the newest record counts, also for the blocks that it has given up
since: their old records stay in the DHT for a while. A record that is valid for longer than any
server announces is none, and what a server says when it is asked counts for all.

Anybody can store anything in a server's name. Of a server that was ever seen to sign its records
only signed ones count, and others count for the blocks alone under which they stand. An unsigned
*offline* is over, whatever its expiry, as soon as the server is heard to announce itself again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hivemind.utils import ValueWithExpiration, get_dht_time

from swarm_notebook.net.dht.records import (
    MAX_SECONDS,
    Announcement,
    ServerInfo,
    ServerState,
    announcements,
    is_member,
    parse_record,
)
from swarm_notebook.net.membership.certificate import Membership

# A server that has not signed anything for so long may be one without signatures by now.
FORGET_SIGNER_SECONDS = 3600.0


@dataclass(frozen=True)
class _Record:
    """What a server announced, until when that holds (in the DHT's time), and when it was read."""

    info: ServerInfo
    expires: float
    read: float
    signed: bool

    @property
    def weight(self) -> tuple[bool, float]:
        """Of two records of one server the one with more of it counts."""
        return self.signed, self.expires


class Announced:
    """The records under each block's key, by peer.

    Args:
        prefix: of the model; a signature for another model's blocks is none.
        membership: in a private swarm; only what its servers have signed is believed.
    """

    def __init__(self, prefix: str = "", membership: Membership | None = None) -> None:
        self._prefix, self._membership = prefix, membership
        self._blocks: dict[int, dict[str, _Record]] = {}
        self._signers: dict[str, float] = {}

    def update(self, block: int, found: ValueWithExpiration | None, when: float = 0.0) -> None:
        """Take in what a reading found under a block's key; None or rubbish changes nothing.

        Args:
            when: of the reading, in seconds of Unix time, the same for all blocks; 0 is now.
        """
        now = get_dht_time()
        known = self._blocks.get(block, {})
        self._blocks[block] = {peer: found for peer, found in known.items() if found.expires > now}
        self._signers = {
            peer: seen for peer, seen in self._signers.items() if seen > now - FORGET_SIGNER_SECONDS
        }
        for one in self._read(block, found):
            self._take(block, one, when or time.time())

    def check(self, found: Mapping[int, ValueWithExpiration | None]) -> None:
        """Check the signatures of a reading, by block, so that `update` need not.

        That may take seconds where strangers have stored many; any thread may do it.
        """
        for block, value in found.items():
            for _ in self._read(block, value):
                pass

    def told(self, peer: str, answer: Mapping[str, Any], num_blocks: int) -> None:
        """Take in the record that a server hands out itself when it is asked: nothing else counts.

        Args:
            answer: to rpc_info; that of a Petals server has no record and changes nothing.
        """
        info, expires = parse_record(answer.get("record")), answer.get("record_expires")
        if info is None or type(expires) is not float:
            return
        if not is_member(self._membership, peer, info):
            return
        now = get_dht_time()
        if not 0 < expires - now <= MAX_SECONDS:
            return
        self._signers[peer] = now
        record = _Record(info, expires, time.time(), signed=True)
        for known in self._blocks.values():
            before = known.pop(peer, None)
            if before is not None and before.info == info:
                record = replace(record, read=before.read)
        if info.model == self._prefix:
            for block in range(info.start_block or 0, min(info.end_block or 0, num_blocks)):
                self._blocks.setdefault(block, {})[peer] = record

    def holders(self) -> dict[int, dict[str, ServerInfo]]:
        """Who holds each block, with its newest record."""
        newest = self._newest()
        return {
            block: {
                peer: newest[peer].info
                for peer in known
                if peer in newest and _hosts(newest[peer].info, block)
            }
            for block, known in self._blocks.items()
        }

    def times(self) -> dict[str, float]:
        """When each server's newest record was first read, in seconds of Unix time."""
        return {peer: record.read for peer, record in self._newest().items()}

    def doubtful(self) -> set[str]:
        """Servers that are offline as far as is known, of which nobody has signed that."""
        return {
            peer
            for peer, record in self._newest().items()
            if not record.signed and record.info.state == ServerState.OFFLINE
        }

    def _read(self, block: int, found: ValueWithExpiration | None) -> Iterator[Announcement]:
        known = self._blocks.get(block, {})
        return announcements(found, self._prefix, self._membership, known)

    def _take(self, block: int, one: Announcement, when: float) -> None:
        if one.signed:
            self._signers[one.peer] = get_dht_time()
        elif one.peer in self._signers:
            return
        record = _Record(one.info, one.expires, when, one.signed)
        known = self._blocks[block]
        before = known.get(one.peer)
        if before is None or before.weight < record.weight:
            known[one.peer] = record
        elif before.weight == record.weight:
            known[one.peer] = replace(before, info=one.info)

    def _newest(self) -> dict[str, _Record]:
        by_peer: dict[str, list[_Record]] = {}
        for known in self._blocks.values():
            for peer, record in known.items():
                by_peer.setdefault(peer, []).append(record)
        if self._membership is not None:  # it may have ended since
            by_peer = {
                peer: records
                for peer, records in by_peer.items()
                if any(is_member(self._membership, peer, record.info) for record in records)
            }
        return {peer: _newest_of(records) for peer, records in by_peer.items()}


def _newest_of(records: Sequence[_Record]) -> _Record:
    newest = max(records, key=lambda record: record.weight)
    if newest.signed or newest.info.state != ServerState.OFFLINE:
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
