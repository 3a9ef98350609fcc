"""How often each peer was refused of late, and what that costs it.

A refusal costs a server a stream, a look at what came, and an answer. Whoever is refused again and
again would take from others what these take together. So every peer has some refusals free, and
each is forgiven in time; beyond, the peer is heard late: what it begins waits, one after the other,
before anything of it is read. Its refusals say so. Nothing else is late: not its sessions that are
open, nor anybody else.

A new identity costs its owner nothing. So what is free for a peer is free only once for all of an
address that were answered nothing yet: beyond, what these begin is late as well, each by itself.
An answer that was asked for pays for one refusal more. So nobody who works with a server is late
for what others of its address do, and who is new there waits a second at most.

Of addresses some have many. What is free at all of them together is bounded, too: while that is
used up, little is free at one address, and what is late there comes one after the other.

Who goes on so for long, though late and told so, is cut off for a while: what it begins ends at
once, unread.

What a peer still sends after a refusal is thrown away, at a bounded pace for each peer: faster, and
a frame that nobody wants would cost what one costs that somebody does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm_notebook.errors import BadRequest, NotAMember, RemoteError, ServerBusy

if TYPE_CHECKING:
    from hivemind.utils.multiaddr import Multiaddr

    from swarm_notebook.net.wire.streams import Stream

logger: logging.Logger = logging.getLogger(__name__)

# Whoever tries out what a server takes by hand meets fewer in a minute, and a notebook, which
# avoids a server that refuses it, meets one of each kind.
FREE_REFUSALS = 64.0
# Of all of an address that were answered nothing: thirty notebooks in a classroom that try out four
# wrong requests each.
FREE_AT_ADDRESS = 128.0
FORGIVEN_PER_SECOND = 2.0
# Of all peers that were answered nothing: eight addresses that use up theirs. While there are more
# refusals, so many are free at each address: a notebook that is new tries out as many at most.
FREE_IN_ALL, FREE_IN_A_CROWD = 8 * FREE_AT_ADDRESS, 8.0
FORGIVEN_IN_ALL = 8 * FORGIVEN_PER_SECOND
# A crowd that has stopped is none any more after half a minute.
MOST_IN_ALL = FREE_IN_ALL + 30 * FORGIVEN_IN_ALL
# However many there were, a peer that has stopped is late no more after half a minute.
MOST_LATE = 64.0
MOST_REFUSALS = FREE_REFUSALS + MOST_LATE
# For each one too many: with all of them a second and more, which is ten times a busy round trip.
LATE_SECONDS = 0.02
# Who would have to wait longer is told so instead: notebooks have gone elsewhere by then.
LONGEST_TURN = 10.0
# A server that is busy is no fault of who asks; who asks without end is a flood nevertheless.
BUSY_WEIGHT = 0.25
# A minute of refusals that are all late: a notebook leaves a server that refuses it within seconds.
CUT_AFTER = 60.0
# Long enough that coming back is not worth a stream, short enough for who has mended a fault.
CUT_SECONDS = 600.0
# What was read for nothing counts as well: a refusal more for every MiB.
REFUSED_BYTES = 1 << 20
# Peers that are remembered, of 200 bytes each; then those go that have least to be forgiven.
MAX_PEERS = 4096
# A link of 128 Mbit/s, at which throwing away takes a hundredth of a core.
DISCARDED_PER_SECOND = 16 << 20
# Streams that wait until their peer has read its refusal, if there are descriptors for them.
MAX_LINGERING = 1024


@dataclass(slots=True)
class _Record:
    """One peer's refusals at a moment, and until when it is kept waiting for each of two things.

    Attributes:
        address: where it is, if it has opened a stream.
        paid: for how many refusals it has paid with answers that it asked for.
        late: since when it has been late without a break; 0 if it is not.
        cut: until when it is cut off.
    """

    refusals: float = 0.0
    when: float = 0.0
    heard: float = 0.0
    discarded: float = 0.0
    late: float = 0.0
    cut: float = 0.0
    address: str = ""
    paid: float = 0.0


class Conduct:
    """What one server remembers of its peers. Belongs to the loop."""

    def __init__(self) -> None:
        # Of peers, and of addresses, which no peer is called like.
        self._records: dict[str, _Record] = {}
        # Of all that were answered nothing.
        self._new = _Record()
        self._lingering: dict[str, deque[Stream]] = {}
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = MAX_LINGERING if descriptors <= 0 else min(MAX_LINGERING, descriptors // 4)

    def met(self, peer: str, address: Multiaddr) -> None:
        """A peer has opened a stream from an address."""
        self._record(peer).address = network_of(address)

    def answered(self, peer: str, answers: int) -> None:
        """So much of what a peer asked for was answered."""
        if answers:
            record = self._record(peer)
            record.paid = min(record.paid + answers, FREE_REFUSALS)

    def refusals(self, peer: str) -> float:
        """How many refusals of a peer are not forgiven yet."""
        record = self._records.get(peer)
        return 0.0 if record is None else _left(record, _now())

    def refused(self, peer: str, error: BaseException, read: int = 0) -> None:
        """A peer was refused after so many bytes were read."""
        weight = BUSY_WEIGHT if isinstance(error, ServerBusy) else 1.0
        if not isinstance(error, (BadRequest, NotAMember, ServerBusy)):
            return  # the server's own failure, or part of an honest exchange
        now, record = _now(), self._record(peer)
        weight += read / REFUSED_BYTES
        left = _left(record, now) + weight
        record.refusals, record.when = min(left, MOST_REFUSALS), now
        self._charge_address(record, min(weight, FREE_REFUSALS - left + weight), now)
        if left <= FREE_REFUSALS:
            record.late = 0.0
        elif not record.late:
            record.late = now
        elif now - record.late >= CUT_AFTER and now >= record.cut:
            record.cut = now + CUT_SECONDS
            logger.warning(
                "cut off peer %s for %.0f s: refused for %.0f s on end, though heard late",
                peer,
                CUT_SECONDS,
                now - record.late,
            )

    def refusal(self, peer: str, error: RemoteError, read: int) -> RemoteError:
        """As `refused`; what to tell the peer, which hears of it if it is heard late."""
        late = self.told(peer)
        self.refused(peer, error, read)
        # A line for each refusal of a flood would cost more than the refusal, and hide all others.
        level = logging.DEBUG if late else logging.INFO
        logger.log(level, "refused a request of %s: %s", peer, error)
        return type(error)(f"{error}{late}") if late else error

    def cut_off(self, peer: str) -> bool:
        """Whether nothing of a peer is heard at present."""
        record = self._records.get(peer)
        return record is not None and _now() < record.cut

    def told(self, peer: str) -> str:
        """What a refusal says besides, to a peer that is heard late; else nothing."""
        late = self._late(peer)
        if not late:
            return ""
        refusals = self.refusals(peer)
        who = f"this peer was refused {refusals:.0f} times"
        if refusals <= FREE_REFUSALS:
            who = "peers that are new at its address were refused too many times"
        return (
            f" ({who} of late, so it is heard {late:.1f} s late; "
            f"{FORGIVEN_PER_SECOND:.0f} are forgiven every second)"
        )

    async def turn(self, peer: str) -> None:
        """Wait until it is the turn of what a peer begins; not at all if it is seldom refused.

        Raises:
            ServerBusy: that would take too long.
        """
        late = self._late(peer)
        if not late:
            return
        now, queue = _now(), self._record(peer)
        who = "this peer"
        if self._crowded(now) and self.refusals(peer) <= FREE_REFUSALS:
            queue, who = self._record(_at(queue.address)), "peers that are new at its address"
        heard = max(queue.heard, now) + late
        if heard - now > LONGEST_TURN:
            raise ServerBusy(f"too much of {who} waits to be heard, for {queue.heard - now:.0f} s")
        queue.heard = heard
        await asyncio.sleep(heard - now)

    async def discard(self, peer: str, size: int) -> None:
        """So many bytes of a peer were thrown away: wait until more of them may be."""
        now, record = _now(), self._record(peer)
        record.discarded = max(record.discarded, now) + size / DISCARDED_PER_SECOND
        await asyncio.sleep(record.discarded - now)

    async def linger(self, stream: Stream) -> None:
        """Keep a stream until its peer, which has the last word to read, has closed it.

        For a while, and as many as there are descriptors for: then whoever has most of them loses
        the one that has had most time.
        """
        if sum(map(len, self._lingering.values())) >= self._most:
            max(self._lingering.values(), key=len).popleft().close()
        mine = self._lingering.setdefault(stream.peer, deque())
        mine.append(stream)
        try:
            await stream.linger(self.discard)
        finally:
            with contextlib.suppress(ValueError):
                mine.remove(stream)
            if not mine and self._lingering.get(stream.peer) is mine:
                del self._lingering[stream.peer]

    def _charge_address(self, record: _Record, free: float, now: float) -> None:
        """Count what was free for a peer and it has not paid for."""
        free -= (paid := min(record.paid, max(free, 0.0)))
        record.paid -= paid
        if free > 0.0:
            there = self._record(_at(record.address))
            left = _left(there, now) + free
            there.refusals, there.when = min(left, FREE_AT_ADDRESS + MOST_LATE), now
            left = _left(self._new, now, FORGIVEN_IN_ALL) + free
            self._new.refusals, self._new.when = min(left, MOST_IN_ALL), now

    def _crowded(self, now: float) -> bool:
        """Whether more is refused to those who were answered nothing than is free in all."""
        return _left(self._new, now, FORGIVEN_IN_ALL) > FREE_IN_ALL

    def _late(self, peer: str) -> float:
        beyond = self.refusals(peer) - FREE_REFUSALS
        record = self._records.get(peer)
        if record is None or record.paid < 1.0:
            there = _at("" if record is None else record.address)
            free = FREE_IN_A_CROWD if self._crowded(_now()) else FREE_AT_ADDRESS
            beyond = max(beyond, min(self.refusals(there) - free, MOST_LATE))
        return max(0.0, beyond) * LATE_SECONDS

    def _record(self, peer: str) -> _Record:
        record = self._records.get(peer)
        if record is None:
            if len(self._records) >= MAX_PEERS:
                now = _now()
                kept = sorted(self._records.items(), key=lambda item: _worth(item[1], now))
                self._records = dict(kept[MAX_PEERS // 2 :])
            record = self._records[peer] = _Record()
        return record


def network_of(address: Multiaddr) -> str:
    """The part of an address that costs something to have: of IPv6, 64 bits; of a relay, its own.

    Empty, if it has no number.
    """
    for protocol, number in address.items():
        if protocol.name in ("ip4", "ip6"):
            bits = 32 if protocol.name == "ip4" else 64
            return str(ipaddress.ip_network(f"{number}/{bits}", strict=False))
    return ""


def _at(address: str) -> str:
    return f"at {address}"


def _now() -> float:
    return asyncio.get_running_loop().time()


def _left(record: _Record, now: float, forgiven: float = FORGIVEN_PER_SECOND) -> float:
    return max(0.0, record.refusals - (now - record.when) * forgiven)


def _worth(record: _Record, now: float) -> tuple[bool, float]:
    """How much there is to remember of a peer."""
    return now < record.cut, _left(record, now)
