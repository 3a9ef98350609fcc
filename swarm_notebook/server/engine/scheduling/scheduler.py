"""What the torch thread runs next. Decisions only: no torch, no threads, no clock.

There are three kinds of work. A *step* is a token or a few of a session that decodes; steps of one
group run as one batch (`steps.batching`). A *prefill chunk* is a part of a long prompt; a session
submits the next one when it has the result of the last, so others come in between. *Stateless* work
is a forward or backward request, or upkeep of the server itself; a long request comes in `pieces`,
and what is left of it is next among the work of its client.

Each kind has its share of the time (`SHARES`) while others want it, and all of it otherwise; within
a kind all clients have equal shares. Both are start-time fair queueing (`FairShares`; Goyal, Vin,
Cheng 1996): next is who has used least, and who was idle comes back without credit. Nobody
starves, and who asks for more has the longer queue.

A batch takes one step of each client after another, up to `BATCH_TOKENS`; the rest comes next.
Sessions that were answered together send their next steps within milliseconds of each other, and
a call takes nearly as long for one as for all of them: `window` says how long to wait for them.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar

from swarm_notebook.errors import ServerBusy

# Four of the longest steps (`steps.batching.SHORT_TOKENS`): a call may be long, but no prefill.
BATCH_TOKENS = 256
# Stateless requests that wait or run, of one client and of all. A notebook that trains over a chain
# sends its batch in parts, two per server, so 64 is more than an honest one needs.
CLIENT_PASSES = 64
PASSES = 256

# Tokens of a chunk: fewer waste the weights that are read for them, and more gain little. On an
# H100 (8B shape) 512 take 33 ms, 1,024 take 49 and 2,048 take 68. Where attention has no kernel
# of its own, its weights take memory by the square.
MIN_CHUNK, MAX_CHUNK = 32, 1024
FIRST_CHUNK = 64
# The forward pass that autograd records, and two products for each of its own on the way back.
BACKWARD_COST = 3
# Of a pass, in tokens through one block: eight through one and back; and no bound but time, as
# cards want them large. With four times as many at least, pieces of 16,384 tokens took 15 ms beside
# somebody who decodes, and were to take 11.
MIN_PIECE, MAX_PIECE = 8 * BACKWARD_COST, 1 << 30
# The newest value's weight in a running mean: half is forgotten after two values.
_NEWEST = 0.3
# Sizes of chunks that are remembered, by powers of two.
_SIZES = 4
# How much longer than the shortest possible chunk one may be: a third of its time is for tokens.
_WORTH = 1.5

K = TypeVar("K", bound=Hashable)
W = TypeVar("W")


class Kind(Enum):
    """Kinds of work; see the module."""

    STEP = auto()
    PREFILL_CHUNK = auto()
    STATELESS = auto()


# Who decodes waits for every token, who sends a prompt for the first one, and training runs behind.
SHARES = {Kind.STEP: 4.0, Kind.PREFILL_CHUNK: 2.0, Kind.STATELESS: 1.0}


@dataclass(frozen=True, slots=True)
class Task:
    """What the scheduler knows of some work.

    Attributes:
        client: who asked for it; "" is the server itself.
        tokens: rows x positions.
        group: work of the same group can run as one; None runs alone.
        blocks: how many it runs through, if that is all that it does.
        session: whose step it is.
        work: of what comes in pieces: in tokens through one block forward, a backward being
            `BACKWARD_COST` of them.
    """

    kind: Kind
    client: str = ""
    tokens: int = 0
    group: Hashable | None = None
    blocks: int = 0
    session: Hashable | None = None
    work: int = 0


UPKEEP = Task(Kind.STATELESS)


class FairShares(Generic[K]):
    """How much each has used, and so who is next (start-time fair queueing)."""

    def __init__(self) -> None:
        self._used: dict[K, float] = {}
        # The virtual time: what the one who is served had used before; newcomers begin here.
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

    def reset(self) -> None:
        """Nobody waits: all begin anew."""
        self._used.clear()
        self._now = 0.0

    def _of(self, key: K) -> float:
        return max(self._used.get(key, 0.0), self._now)


class Schedule(Generic[W]):
    """Work that waits, and which of it is next."""

    def __init__(self) -> None:
        self._by_kind: dict[Kind, _KindQueues[W]] = {kind: _KindQueues() for kind in Kind}
        self._kinds: FairShares[Kind] = FairShares()
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def add(self, task: Task, work: W, *, begun: bool = False) -> None:
        """Let work wait; what has ``begun`` goes on before all else of its client."""
        self._waiting += 1
        self._by_kind[task.kind].add(task, work, begun=begun)

    def has_others(self, client: str) -> bool:
        """Whether work of anybody else waits; to be asked anywhere."""
        return any(other != client for kind in self._by_kind.values() for other in [*kind.queues])

    @property
    def batchable(self) -> int:
        """How many steps wait, if nothing else does and they may share a call; else 0."""
        steps = self._by_kind[Kind.STEP].queues.values()
        groups = {task.group for queue in steps for task, _ in queue}
        return self._waiting if len(groups) == 1 and None not in groups and self._only_steps else 0

    @property
    def _only_steps(self) -> bool:
        return not any(
            queued.queues for kind, queued in self._by_kind.items() if kind is not Kind.STEP
        )

    def take(self) -> list[tuple[Task, W]]:
        """The work to run now as one: a single one, or several of one group. Some must wait."""
        kind = self._kinds.order(kind for kind, queued in self._by_kind.items() if queued.queues)[0]
        self._kinds.serve(kind)
        taken = self._by_kind[kind].take()
        self._waiting -= len(taken)
        return taken

    def ran(self, tasks: Sequence[Task], seconds: float) -> None:
        """What was taken has run, for so long."""
        kind = tasks[0].kind
        queued = self._by_kind[kind]
        self._kinds.charge(kind, seconds / SHARES[kind])
        for task in tasks:
            queued.shares.charge(task.client, seconds / len(tasks))
        if not queued.queues:
            queued.shares.reset()
        if not self._waiting:
            self._kinds.reset()


class _KindQueues(Generic[W]):
    """Work of one kind: a queue per client."""

    def __init__(self) -> None:
        self.queues: dict[str, deque[tuple[Task, W]]] = {}
        self.shares: FairShares[str] = FairShares()

    def add(self, task: Task, work: W, *, begun: bool) -> None:
        queue = self.queues.setdefault(task.client, deque())
        if begun:
            queue.appendleft((task, work))
        else:
            queue.append((task, work))

    def take(self) -> list[tuple[Task, W]]:
        """The next client's first work, and what may run along with it."""
        clients = self.shares.order(self.queues)
        self.shares.serve(clients[0])
        taken = [self.queues[clients[0]].popleft()]
        more = [*clients[1:], clients[0]] if taken[0][0].group is not None else []
        while more:
            more = [client for client in more if self._add_to_batch(client, taken)]
        self.queues = {client: queue for client, queue in self.queues.items() if queue}
        return taken

    def _add_to_batch(self, client: str, taken: list[tuple[Task, W]]) -> bool:
        """Add one more step of a client to those taken; False if it has none that fits."""
        group = taken[0][0].group
        room = BATCH_TOKENS - sum(task.tokens for task, _ in taken)
        queue = self.queues[client]
        for index, (task, _) in enumerate(queue):
            if task.group == group and task.tokens <= room:
                taken.append(queue[index])
                del queue[index]
                return True
        return False


class Admission:
    """Bounds the stateless requests that wait or run, per client and in all."""

    def __init__(self) -> None:
        self._passes: Counter[str] = Counter()

    def enter(self, task: Task) -> bool:
        """Count a task in; whether it counts, and has to `leave`.

        Raises:
            ServerBusy: this client, or all together, have too many waiting.
        """
        if task.kind is not Kind.STATELESS or not task.client:
            return False  # a session has one step in flight at most, and sessions are counted
        mine, all_ = self._passes[task.client], self._passes.total()
        if mine >= CLIENT_PASSES or all_ >= PASSES:
            raise ServerBusy(
                f"{mine} requests of this peer and {all_} of all wait already (at most "
                f"{CLIENT_PASSES} and {PASSES}); wait for their answers or use another server"
            )
        self._passes[task.client] += 1
        return True

    def leave(self, task: Task) -> None:
        """Count a task out: it is done or given up."""
        if task.kind is Kind.STATELESS and task.client:
            self._passes[task.client] -= 1
            if not self._passes[task.client]:
                del self._passes[task.client]


def _mean_cost(known: float | None, amount: int, seconds: float) -> float:
    """The running mean of what one of an amount takes, after so many took so many seconds.

    Of seconds, not of rates: where a busy machine makes them differ, a mean of rates is that of the
    quick ones, and pieces took 1.8 times as long as they were to, on average.
    """
    cost = max(seconds, 1e-6) / amount
    return cost if known is None else _NEWEST * cost + (1 - _NEWEST) * known


class ChunkSizer:
    """How many tokens a chunk of prefill may have, from how long the last ones took.

    A chunk costs something however few tokens it has: its weights are read, and on a card its
    kernels are launched, which takes as long for 32 tokens as for 400. So a line is fitted to
    chunks of several sizes, and where none can be as short as it should, one may take `_WORTH`
    times as long as the least. With costs by token alone chunks on an H200 shrank to 32 tokens
    beside sessions that decode, and 32 prompts of 448 tokens took 14 to 26 s.

    Args:
        least, most: bounds of what `size` says.
        first: what it says before anything is known.
        cost: seconds of one token, if they are known.
    """

    def __init__(
        self,
        least: int = MIN_CHUNK,
        most: int = MAX_CHUNK,
        first: int = FIRST_CHUNK,
        cost: float | None = None,
    ) -> None:
        self._least, self._most, self._first = least, most, first
        # By powers of two, those that came last at the end: the mean size, and the mean time.
        self._ran: dict[int, tuple[float, float]] = {}
        self._line = None if cost is None else _Line(0.0, cost, [(1.0, cost)])

    def ran(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took so many seconds."""
        power = tokens.bit_length()
        size, taken = self._ran.pop(power, (tokens, seconds))
        self._ran[power] = _mean(size, tokens), _mean(taken, max(seconds, 1e-6))
        if len(self._ran) > _SIZES:
            del self._ran[next(iter(self._ran))]
        self._line = _Line.through(list(self._ran.values()))

    def size(self, seconds: float) -> int:
        """The tokens of the next chunk, which should take so long; may be asked anywhere."""
        if self._line is None:
            return self._first
        return round(min(max(self._line.tokens(seconds), self._least), self._most))


@dataclass(frozen=True, slots=True)
class _Line:
    """What a chunk takes: ``fixed + cost * tokens`` seconds.

    Attributes:
        known: the sizes and seconds that this is known from, the last of which is the newest.
    """

    fixed: float
    cost: float
    known: Sequence[tuple[float, float]]

    @classmethod
    def through(cls, known: Sequence[tuple[float, float]]) -> _Line:
        """That of least squares."""
        # One of nothing in no time, which decides where there is one size only.
        points = [(0.01, 0.0, 0.0), *((1.0, *chunk) for chunk in known)]
        total = sum(weight for weight, _, _ in points)
        size = sum(weight * x for weight, x, _ in points) / total
        taken = sum(weight * y for weight, _, y in points) / total
        rise = sum(weight * (x - size) * (y - taken) for weight, x, y in points)
        slope = rise / sum(weight * (x - size) ** 2 for weight, x, _ in points)
        fixed = max(0.0, min(taken - slope * size, *(seconds for _, seconds in known)))
        # The machine is as fast as it was for the newest.
        newest_size, newest_taken = known[-1]
        return cls(fixed, max(newest_taken - fixed, 0.0) / newest_size, known)

    def tokens(self, seconds: float) -> float:
        """Of a chunk that takes so long, or a little more than any does."""
        allowed = max(seconds, _WORTH * self.fixed)
        wanted = (allowed - self.fixed) / self.cost if self.cost > 0 else math.inf
        # Beyond what costs by token alone would allow, only step by step: noise makes a line, too,
        # and on a CPU it made one chunk in some hundreds ten times as long as it was to be.
        size, taken = self.known[-1]
        seen = max((tokens for tokens, took in self.known if took <= allowed), default=0.0)
        return min(wanted, max(seconds * size / taken, 2 * seen))


def _mean(known: float, newest: float) -> float:
    return _NEWEST * newest + (1 - _NEWEST) * known


class PassSizer:
    """How much the pieces of a pass may have, in the unit of `Task.work`.

    Every pass has a rate of its own, as attention makes later positions slower than early ones: a
    long pass must not be told that it is as fast as the short ones beside it. It begins with what
    the first pieces of others had.
    """

    def __init__(self) -> None:
        self._first: float | None = None

    def begin(self, task: Task) -> ChunkSizer:
        """The sizes of one pass's pieces."""
        blocks = max(1, task.blocks)
        return ChunkSizer(MIN_PIECE, MAX_PIECE, FIRST_CHUNK * blocks, self._first)

    def began(self, work: int, seconds: float) -> None:
        """The first piece of a pass had so much work and took so many seconds."""
        self._first = _mean_cost(self._first, work, seconds)
