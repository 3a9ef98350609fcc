"""Memory for what arrives and what waits to leave, counted per peer and in all before it is taken.

Every stream, and every request that is answered, has an `Account` with the server's `Traffic`. Who
is about to read a frame, to unpack it or to compute an answer takes its bytes first, and gives them
back when they are gone. A peer may hold no more than its share, all together no more than the
total. What does not fit waits for a while and is then refused as `ServerBusy`.

A peer that is slow could hold its share for long. So while others wait, whoever holds most must
give way, as long as it is the peer that is waited for (`waiting_for_peer`): to send the rest of a
frame, or to read an answer. And a peer that holds next to nothing is let in even when there is no
room, up to `EXTRA_BYTES` in all: an honest notebook's tokens need little, and pass any crowd.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from swarm_notebook.errors import ServerBusy

# Float16 that stands for float32 takes most: its bytes as they came, and twice as many unpacked.
# What is not compressed is there once, made of the bytes that came, or twice while its parts are
# joined; what is no tensor's three times while it is parsed.
COPIES = 3
# Longer than a pass of another peer takes; a notebook asks another server then.
WAIT_SECONDS = 20.0
# A step of one token with its answer, of the largest models, over a stream.
LITTLE_BYTES = 512 << 10
EXTRA_BYTES = 48 << 20
# One request takes no more than the share without this part of it, so that beside the peer's open
# streams even the largest gets in.
SPARE_PART = 8


@dataclass(eq=False)
class Account:
    """What one stream or request of a peer holds. Belongs to the loop.

    Attributes:
        held: bytes.
    """

    _traffic: Traffic
    peer: str
    held: int = 0
    _wait: asyncio.Timeout | None = None
    _evicted: bool = False

    @property
    def share(self) -> int:
        """The most that a peer may hold."""
        return self._traffic.share

    def try_take(self, size: int) -> bool:
        """Take ``size`` bytes if there is room now."""
        return self._traffic._take(self, size)

    async def take(self, size: int) -> int:
        """Take ``size`` bytes, or as much of them as one request may have; may wait.

        Returns:
            how many it took.

        Raises:
            ServerBusy: there was no room for `WAIT_SECONDS`.
        """
        size = min(size, max(0, self.share - self.share // SPARE_PART - self.held))
        if not self._traffic._take(self, size):
            await self._traffic._wait_for_room(self, size)
        return size

    def resize(self, size: int) -> None:
        """Hold so much from now on; it is here already, if it is more than before."""
        self._traffic._set(self, size)

    def close(self) -> None:
        """Give all back."""
        self._traffic._set(self, 0)

    @contextlib.asynccontextmanager
    async def waiting_for_peer(self, seconds: float) -> AsyncIterator[None]:
        """While in here, the peer is waited for, and the account may have to give way to others.

        Raises:
            TimeoutError: it took longer than so many seconds.
            ServerBusy: others need the memory.
        """
        try:
            async with asyncio.timeout(seconds) as self._wait:
                self._traffic._slow.add(self)
                yield
        except TimeoutError:
            if self._evicted:
                raise ServerBusy("others need the memory that this waits in; try again") from None
            raise
        finally:
            self._wait = None
            self._traffic._slow.discard(self)

    def _evict(self) -> None:
        if self._wait is not None and not self._evicted:
            self._evicted = True
            self._wait.reschedule(asyncio.get_running_loop().time())


@dataclass(eq=False)
class _Waiting:
    account: Account
    size: int
    granted: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Traffic:
    """The memory of one server for its traffic.

    Args:
        total: bytes of all peers together.
        share: the most that one peer may hold; half of the total if None.
    """

    total: int
    share: int

    def __init__(self, total: int, share: int | None = None):
        self.total, self.share = total, share or total // 2
        self._held: Counter[str] = Counter()
        self._sum = 0
        self._waiting: list[_Waiting] = []
        self._slow: set[Account] = set()

    @property
    def held(self) -> int:
        """Bytes of all peers."""
        return self._sum

    def open(self, peer: str) -> Account:
        """An account for something that a peer does."""
        return Account(self, peer)

    def _take(self, account: Account, size: int) -> bool:
        mine, all_ = self._held[account.peer] + size, self._sum + size
        extra = EXTRA_BYTES if mine <= LITTLE_BYTES else 0
        if mine > self.share or all_ > self.total + extra:
            if not self._held[account.peer]:
                del self._held[account.peer]
            return False
        account.held += size
        self._held[account.peer] = mine
        self._sum = all_
        return True

    def _set(self, account: Account, size: int) -> None:
        change = size - account.held
        if not change:
            return
        account.held = size
        self._sum += change
        self._held[account.peer] += change
        if not self._held[account.peer]:
            del self._held[account.peer]
        if change < 0 and self._waiting:
            self._let_in()

    def _let_in(self) -> None:
        # Who would hold least comes first: a crowd that asks for much cannot keep it out.
        def would_hold(waiting: _Waiting) -> int:
            return self._held[waiting.account.peer] + waiting.size

        for waiting in sorted(self._waiting, key=would_hold):
            if not waiting.granted.done() and self._take(waiting.account, waiting.size):
                waiting.granted.set_result(None)

    async def _wait_for_room(self, account: Account, size: int) -> None:
        waiting = _Waiting(account, size)
        self._waiting.append(waiting)
        self._make_room(account, size)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await waiting.granted
        except BaseException as error:
            if waiting.granted.done() and not waiting.granted.cancelled():
                self._set(account, account.held - size)  # too late: nobody will give it back
            if not isinstance(error, TimeoutError):
                raise
            raise ServerBusy(
                f"no room for {size} bytes of traffic: this peer holds {self._held[account.peer]} "
                f"of {self.share}, all hold {self._sum} of {self.total}; wait for answers, or use "
                "another server"
            ) from None
        finally:
            self._waiting.remove(waiting)

    def _make_room(self, account: Account, size: int) -> None:
        """Let go of those that wait for a peer which holds more than this one would."""
        mine = self._held[account.peer] + size
        if mine > self.share:
            return  # it is its own share that is used up
        missing = self._sum + size - self.total
        for slow in sorted(self._slow, key=lambda slow: -self._held[slow.peer]):
            if missing <= 0 or self._held[slow.peer] <= mine:
                return
            missing -= slow.held
            slow._evict()
