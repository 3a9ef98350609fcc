"""What the torch thread runs next. Decisions only: no torch, no threads, no clock.

Work comes in three kinds. A *step* is a token or a few of a session that decodes; steps of one
group run as one batch (`batching`). A *piece* is a part of a long prefill; a session submits the
next one when it has the last one's result, so others come in between. A *pass* is a forward or
backward request, or a chore of the server itself.

Each kind has its share of the time (`SHARES`) while others want it, and all of it else; within a
kind all clients have the same. Both follow one rule, `Shares`: next is who has used least, and who
was away comes back without savings. Nobody waits for ever, and the more one asks the longer the
own queue.

A batch takes one step of each client in turn, up to `BATCH_TOKENS`; those left are next. Sessions
that were answered together come back one shortly after the other, and a call costs nearly the same
for one as for all of them: `BatchWindow` knows when it pays to wait a moment. Who is alone never
waits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar

from swarm_notebook.errors import ServerBusy

BATCH_TOKENS = 256
# Passes that wait or run, of one client and of all together. (A notebook that trains over a long
# chain sends its batch in parts, two per server.)
CLIENT_PASSES = 64
PASSES = 256

# A piece of prefill takes about so many seconds while others decode, and else.
CROWDED_SECONDS = 0.06
ALONE_SECONDS = 0.5
MIN_PIECE, MAX_PIECE = 32, 512
FIRST_PIECE = 64
_NEWEST = 0.3

# Waiting for others takes at most this part of a call, and never longer than so many seconds.
GATHER_PART, GATHER_SECONDS = 0.15, 0.005
# A session that has not come for so many calls (and so many seconds) is not expected.
EXPECTED_CALLS, EXPECTED_SECONDS = 6, 0.1
_LEAST_WORTH = 0.1

K = TypeVar("K", bound=Hashable)
W = TypeVar("W")


class Kind(Enum):
    """What a piece of work is; see the module."""

    STEP = auto()
    PREFILL_CHUNK = auto()
    STATELESS = auto()


SHARES = {Kind.STEP: 4.0, Kind.PREFILL_CHUNK: 2.0, Kind.STATELESS: 1.0}


@dataclass(frozen=True, slots=True)
class Task:
    """What the scheduler knows of a piece of work.

    Attributes:
        client: who asked for it; "" is the server itself.
        tokens: rows x positions.
        group: work of the same group can run as one; None runs alone.
        blocks: how many it runs through, if that is all that it does.
        session: whose step it is.
    """

    kind: Kind
    client: str = ""
    tokens: int = 0
    group: Hashable | None = None
    blocks: int = 0
    session: Hashable | None = None


CHORE = Task(Kind.STATELESS)


class Shares(Generic[K]):
    """How much each has used, for who comes next (start-time fair queueing)."""

    def __init__(self) -> None:
        self._used: dict[K, float] = {}
        # What the one who was served last had used before: where newcomers begin.
        self._now = 0.0

    def order(self, waiting: Iterable[K]) -> list[K]:
        """Those who want something, the next first."""
        return sorted(waiting, key=self._of)

    def serve(self, key: K) -> None:
        """``key`` is the next."""
        self._now = self._of(key)

    def charge(self, key: K, amount: float) -> None:
        """``key`` has used so much."""
        self._used[key] = self._of(key) + amount

    def rest(self) -> None:
        """Nobody wants anything: all are even."""
        self._used.clear()
        self._now = 0.0

    def _of(self, key: K) -> float:
        return max(self._used.get(key, 0.0), self._now)


class Schedule(Generic[W]):
    """Work that waits, and which of it is next."""

    def __init__(self) -> None:
        self._lanes: dict[Kind, _Lane[W]] = {kind: _Lane() for kind in Kind}
        self._kinds: Shares[Kind] = Shares()
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def add(self, task: Task, work: W) -> None:
        self._waiting += 1
        self._lanes[task.kind].add(task, work)

    @property
    def joinable(self) -> int:
        """How many steps wait, if nothing else does and they may share a call; else 0."""
        steps = self._lanes[Kind.STEP].queues.values()
        groups = {task.group for queue in steps for task, _ in queue}
        return self._waiting if len(groups) == 1 and None not in groups and self._only_steps else 0

    @property
    def _only_steps(self) -> bool:
        return not any(lane.queues for kind, lane in self._lanes.items() if kind is not Kind.STEP)

    def take(self) -> list[tuple[Task, W]]:
        """The work to run now as one: a single one, or several of one group. Some must wait."""
        kind = self._kinds.order(kind for kind, lane in self._lanes.items() if lane.queues)[0]
        self._kinds.serve(kind)
        taken = self._lanes[kind].take()
        self._waiting -= len(taken)
        return taken

    def ran(self, tasks: Sequence[Task], seconds: float) -> None:
        """What was taken has run, for so long."""
        kind = tasks[0].kind
        lane = self._lanes[kind]
        self._kinds.charge(kind, seconds / SHARES[kind])
        for task in tasks:
            lane.shares.charge(task.client, seconds / len(tasks))
        if not lane.queues:
            lane.shares.rest()
        if not self._waiting:
            self._kinds.rest()


class _Lane(Generic[W]):
    """Work of one kind: a queue per client."""

    def __init__(self) -> None:
        self.queues: dict[str, deque[tuple[Task, W]]] = {}
        self.shares: Shares[str] = Shares()

    def add(self, task: Task, work: W) -> None:
        self.queues.setdefault(task.client, deque()).append((task, work))

    def take(self) -> list[tuple[Task, W]]:
        """The next client's first work, and what may run along with it."""
        clients = self.shares.order(self.queues)
        self.shares.serve(clients[0])
        taken = [self.queues[clients[0]].popleft()]
        turn = [*clients[1:], clients[0]] if taken[0][0].group is not None else []
        while turn:
            turn = [client for client in turn if self._join(client, taken)]
        self.queues = {client: queue for client, queue in self.queues.items() if queue}
        return taken

    def _join(self, client: str, taken: list[tuple[Task, W]]) -> bool:
        """Add one more work of a client to those taken; False if it has none that fits."""
        group = taken[0][0].group
        room = BATCH_TOKENS - sum(task.tokens for task, _ in taken)
        queue = self.queues[client]
        for index, (task, _) in enumerate(queue):
            if task.group == group and task.tokens <= room:
                taken.append(queue[index])
                del queue[index]
                return True
        return False


class BatchWindow:
    """The sessions that decode, and how long the next call should wait for those on their way."""

    def __init__(self) -> None:
        self._came: dict[Hashable, float] = {}
        self._call = 0.0
        self._worth = 1.0

    def came(self, task: Task, now: float) -> None:
        """A step has arrived."""
        if task.kind is Kind.STEP and task.group is not None:
            self._came[task.session] = now

    def ran(self, seconds: float) -> None:
        """A call for steps has run."""
        self._call += _NEWEST * (seconds - self._call)

    def gathered(self, came: int) -> None:
        """A wait has ended, and so many steps have come in it."""
        self._worth += _NEWEST * ((came > 0) - self._worth)

    def patience(self, waiting: int, now: float) -> float:
        """Seconds to wait for more than the ``waiting`` steps that could share a call."""
        since = now - max(EXPECTED_SECONDS, EXPECTED_CALLS * self._call)
        self._came = {session: came for session, came in self._came.items() if came > since}
        if not waiting or waiting >= len(self._came):
            return 0.0
        # Sessions that keep out of each other's way, on different servers, are not waited for.
        return max(self._worth, _LEAST_WORTH) * min(GATHER_PART * self._call, GATHER_SECONDS)


class Admission:
    """Passes that wait or run, per client: how many are taken on."""

    def __init__(self) -> None:
        self._passes: Counter[str] = Counter()

    def enter(self, task: Task) -> None:
        """Take on a task.

        Raises:
            ServerBusy: this client, or all together, have too many waiting.
        """
        if task.kind is not Kind.STATELESS or not task.client:
            return  # a session has one step in flight at most, and sessions are counted
        mine, all_ = self._passes[task.client], self._passes.total()
        if mine >= CLIENT_PASSES or all_ >= PASSES:
            raise ServerBusy(
                f"{mine} requests of this peer and {all_} of all wait already (at most "
                f"{CLIENT_PASSES} and {PASSES}); wait for their answers or use another server"
            )
        self._passes[task.client] += 1

    def leave(self, task: Task) -> None:
        """A task that was taken on is done or given up."""
        if task.kind is Kind.STATELESS and task.client:
            self._passes[task.client] -= 1
            if not self._passes[task.client]:
                del self._passes[task.client]


class ChunkSizer:
    """How long pieces of prefill may be, by how fast they have been."""

    def __init__(self) -> None:
        self._rate: float | None = None

    def ran(self, tokens: int, seconds: float) -> None:
        """A piece of so many tokens has run, for so long."""
        rate = tokens / max(seconds, 1e-6)
        self._rate = rate if self._rate is None else _NEWEST * rate + (1 - _NEWEST) * self._rate

    def piece(self, *, crowded: bool) -> int:
        """The tokens of the next piece; ``crowded`` if others decode or wait."""
        if self._rate is None:
            return FIRST_PIECE
        tokens = self._rate * (CROWDED_SECONDS if crowded else ALONE_SECONDS)
        return int(min(max(tokens, MIN_PIECE), MAX_PIECE))
