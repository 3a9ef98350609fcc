"""Who may hold how much of the server's key-value memory.

The budget counts cache tokens: one position of one row through all hosted blocks. A session takes
room as it grows and keeps it while its notebook is idle, until others need it. `KVBudget` decides
and does no I/O; `CachePool` lets requests wait for its decisions.

A session asks for a preferred size (ahead of its need, so that it asks seldom) and a minimum.
It gets the preferred size if that is free, else the minimum, else what of it there is when idle
sessions have been dropped for the minimum, least recently used first: with that alone it would be
back with its next token, and wait again. A session is idle when no step of it is in flight, and
may be dropped after `IDLE_SECONDS`; if nothing else helps, the request waits, and at the end of its
wait sessions may be dropped that have been idle all that time. Who gets nothing gets `CacheFull`
with the numbers. A dropped session's notebook sees `SessionLost` and rebuilds from its history.

Nobody is refused for what another client holds beyond its share, the same part for each who holds
or wants some: sessions of whoever has most end at once for who has less than that, steps in flight
or not. An identity costs nothing, and many could make everybody's share small: so nobody loses
what is within a `PROTECTED_PART` of all.

When memory comes free, those who wait look in order: first who holds some already (who goes on
will end, and give it back), then the others, each as they came. A few may wait, beyond them is
`ServerBusy`. Sessions themselves cost something, too, so their number is bounded, for one client
and for all; at the bound, the longest idle one makes room.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from swarm_notebook.errors import CacheFull, ServerBusy, SessionLost

# Short, as a notebook whose session was dropped rebuilds it by itself, for the price of a prefill.
IDLE_SECONDS = 30.0
# However short its wait was, nobody takes the memory of a session that paused for a moment.
SHORT_IDLE_SECONDS = 2.0
# However long a client asks for, so that those who wait come to an end.
MAX_WAIT_SECONDS = 60.0
CLIENT_WAITING = 16
WAITING = 64
# Sessions cost two tasks and a stream each, even without a cache; one client cannot have them all.
CLIENT_SESSIONS = 128
SESSIONS = 1024
# Of the cache, as one over this, at least is a client's share: eight that are at work fill it, and
# a ninth waits as it would have without shares; with less, a flood of identities could end sessions
# that need hardly more than a prompt.
PROTECTED_PART = 8


@dataclass(eq=False)
class Reservation:
    """One session's part of the budget.

    Attributes:
        closed: set when the session holds nothing any more.
    """

    drop: Callable[[], None]
    client: str = ""
    tokens: int = 0
    busy: bool = False
    last_used: float = 0.0
    closed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Grant:
    """What a request gets, and whose sessions end for it."""

    tokens: int
    dropped: tuple[Reservation, ...] = ()


@dataclass
class KVBudget:
    """The budget and who holds what; pure decisions, time is an argument."""

    total: int
    reservations: list[Reservation] = field(default_factory=list)

    @property
    def free(self) -> int:
        return self.total - sum(reservation.tokens for reservation in self.reservations)

    def held(self) -> Counter[str]:
        """What each client holds, of those who hold or want some."""
        held = Counter[str]()
        for reservation in self.reservations:
            if reservation.tokens or reservation.busy:
                held[reservation.client] += reservation.tokens
        return held

    def decide(
        self,
        reservation: Reservation,
        preferred: int,
        minimum: int,
        now: float,
        idle_seconds: float,
    ) -> Grant | None:
        """The size that ``reservation`` may have now, or None if it has to wait."""
        room = self.free + reservation.tokens
        if preferred <= room:
            return Grant(preferred)
        if minimum <= room:
            return Grant(minimum)
        dropped = []
        for other in self._idle(reservation, now - idle_seconds):
            dropped.append(other)
            room += other.tokens
            if minimum <= room:
                return Grant(min(preferred, room), tuple(dropped))
        for other in self._beyond_shares(reservation, minimum, dropped):
            dropped.append(other)
            room += other.tokens
            if minimum <= room:
                return Grant(min(preferred, room), tuple(dropped))
        return None

    def admit(self, client: str, now: float) -> Reservation | None:
        """Whether ``client`` may have one more session; the session that ends for it, if any.

        Raises:
            ServerBusy: it has too many, or all together have and none of them is idle.
        """
        mine = sum(reservation.client == client for reservation in self.reservations)
        if mine >= CLIENT_SESSIONS:
            raise ServerBusy(
                f"this peer has {mine} sessions open here, the most that one may have; close some "
                "(a session ends with its stream)"
            )
        if len(self.reservations) < SESSIONS:
            return None
        idle = self._idle(None, now - IDLE_SECONDS)
        if not idle:
            raise ServerBusy(
                f"all of the {SESSIONS} sessions that this server can have are in use; try again "
                "later or use another server"
            )
        return idle[0]

    def apply(self, reservation: Reservation, grant: Grant) -> None:
        """Write down a decision."""
        for other in grant.dropped:
            self.reservations.remove(other)
            other.tokens = 0
        reservation.tokens = grant.tokens

    def _beyond_shares(
        self, reservation: Reservation, minimum: int, dropped: Collection[Reservation]
    ) -> Iterator[Reservation]:
        """Sessions that end for one whose client has less than its share, the next one each time.

        Of the client who has most, and of its sessions the longest unused.
        """
        held = self.held()
        held[reservation.client] += minimum - reservation.tokens
        share = self.total // min(len(held), PROTECTED_PART)
        if held[reservation.client] > share:
            return
        for other in dropped:
            held[other.client] -= other.tokens
        left = [one for one in self.reservations if one.tokens and one not in dropped]
        left.sort(key=lambda one: one.last_used)
        while held[most := max(held, key=held.__getitem__)] > share:
            found = next(one for one in left if one.client == most)
            left.remove(found)
            held[most] -= found.tokens
            yield found

    def _idle(self, reservation: Reservation | None, since: float) -> list[Reservation]:
        """Other sessions that have been idle since then, the longest first.

        Args:
            reservation: who needs memory, so that only sessions that hold some are meant; None:
                all.
        """
        idle = [
            other
            for other in self.reservations
            if other is not reservation
            and not other.busy
            and (other.tokens or reservation is None)
            and other.last_used <= since
        ]
        return sorted(idle, key=lambda other: other.last_used)


class CachePool:
    """The budget, for sessions of one asyncio loop."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic):
        self._budget = KVBudget(total)
        self._clock = clock
        self._waiting: list[tuple[asyncio.Event, Reservation]] = []

    @property
    def total(self) -> int:
        return self._budget.total

    @property
    def free(self) -> int:
        return self._budget.free

    @property
    def sessions(self) -> int:
        return len(self._budget.reservations)

    def open(self, drop: Callable[[], None], client: str = "") -> Reservation:
        """A new session's reservation; ``drop`` is called when the session loses its memory.

        Then it gives it back at once, or after a step in flight, when it is closed.

        Raises:
            ServerBusy: there are too many sessions.
        """
        now = self._clock()
        if (ended := self._budget.admit(client, now)) is not None:
            self.close(ended)
            ended.drop()
        reservation = Reservation(drop, client, last_used=now)
        self._budget.reservations.append(reservation)
        return reservation

    def close(self, reservation: Reservation) -> None:
        """Give back all that a session holds; a second call does nothing."""
        if reservation in self._budget.reservations:
            self._budget.reservations.remove(reservation)
        reservation.tokens = 0
        reservation.closed.set()
        self._wake()

    def begin(self, reservation: Reservation) -> None:
        """A step of the session is in flight: it cannot be dropped."""
        reservation.busy = True

    def end(self, reservation: Reservation) -> None:
        """The step is done; the session is idle from now on."""
        reservation.busy = False
        reservation.last_used = self._clock()

    async def resize(
        self, reservation: Reservation, preferred: int, minimum: int, wait: float
    ) -> int:
        """Room for ``preferred`` or at least ``minimum`` tokens in all; the size granted.

        Raises:
            CacheFull: more than the server has, or nothing became free within ``wait`` seconds.
            SessionLost: the session was dropped meanwhile.
        """
        if minimum > self.total:
            raise CacheFull(
                f"the session needs {minimum} cache tokens (rows x positions), more than the "
                f"{self.total} that this server has; use fewer rows or shorter prompts, or start "
                "the server with more --cache-tokens"
            )
        begun = self._clock()
        deadline = begun + min(wait, MAX_WAIT_SECONDS)
        idle = IDLE_SECONDS
        while True:
            now = self._clock()
            if now >= deadline:
                idle = min(IDLE_SECONDS, max(now - begun, SHORT_IDLE_SECONDS))
            grant = self._budget.decide(reservation, min(preferred, self.total), minimum, now, idle)
            if grant is not None:
                return await self._apply(reservation, grant)
            if now >= deadline:
                raise CacheFull(
                    f"asked for {minimum} cache tokens (rows x positions), {self.free} of "
                    f"{self.total} are free and nothing came free within {now - begun:.0f} s; "
                    "try again later or use another server"
                )
            await self._changed(reservation, deadline - now)
            if reservation not in self._budget.reservations:
                raise SessionLost("others needed the memory of this session")

    async def _apply(self, reservation: Reservation, grant: Grant) -> int:
        shrunk = grant.tokens < reservation.tokens
        # The books first, so that nobody else takes what those in flight still give back.
        self._budget.apply(reservation, grant)
        in_flight = [other for other in grant.dropped if other.busy]
        for other in grant.dropped:
            other.drop()
        if shrunk or grant.dropped:
            self._wake()
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                for other in in_flight:
                    await other.closed.wait()
        except TimeoutError:
            raise CacheFull(
                f"a step that is in flight has kept the memory of {grant.tokens} cache tokens for "
                f"{MAX_WAIT_SECONDS:.0f} s; try again later or use another server"
            ) from None
        return grant.tokens

    async def _changed(self, reservation: Reservation, seconds: float) -> None:
        """Wait until somebody gives memory back, at most this long."""
        mine = sum(other.client == reservation.client for _, other in self._waiting)
        if mine >= CLIENT_WAITING or len(self._waiting) >= WAITING:
            raise ServerBusy(
                f"{len(self._waiting)} sessions wait for cache memory already, {mine} of them of "
                "this peer; try again later or use another server"
            )
        waiting = asyncio.Event(), reservation
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(seconds):
                await waiting[0].wait()
        except TimeoutError:
            pass
        finally:
            self._waiting.remove(waiting)

    def _wake(self) -> None:
        for event, _ in sorted(self._waiting, key=lambda waiting: not waiting[1].tokens):
            event.set()
