"""What happens while tokens pass through the swarm, and what each server got and gave for it.

The network thread publishes; any number of subscriptions, each read in a thread of its own,
receive. A subscription holds a bounded number of events and forgets the oldest: a reader that is
slow or gone costs nothing. The steps of the latest generation are kept as well, for `trace`, and
`Usage` counts for `bill`.

An event is a `StepRecord` (tokens of a session have passed blocks), a `PassRecord` (the same
without a cache) or a `Failover` (a server was lost). All times are seconds; moments are those of
`time.perf_counter`.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.net.wire.streams import ByteMeter

# Steps of one generation that are kept for its trace, the latest ones; a record with 8 servers is
# about 2 kB, so 8 MB at most.
MAX_STEPS = 4096
# Events that wait for a reader: a minute of them at 15 tokens/s.
MAX_EVENTS = 1024
# Weight of the latest token in a server's seconds per token: about the last five count.
SMOOTHING = 0.3


class HopTimes(NamedTuple):
    """One request to a server: blocks ``[start, end)``, and the seconds of its parts.

    ``network`` is what lies between the others: to the server and back, and all that operating
    systems and network daemons do. Petals' servers do not report their part, which then counts as
    network.
    """

    peer: str
    name: str
    start: int
    end: int
    serialisation: float
    network: float
    queue: float
    compute: float

    def plus(self, other: HopTimes | None) -> HopTimes:
        """Two requests for the same blocks as one."""
        if other is None:
            return self
        parts = [mine + theirs for mine, theirs in zip(self[4:], other[4:], strict=True)]
        return HopTimes(*self[:4], *parts)


class StepRecord(NamedTuple):
    """``tokens`` of ``rows`` sequences each, from ``position`` on, went through the blocks.

    Attributes:
        began: when the notebook's network thread got the step.
        ended: when it had the result.
        hops: the servers in the order of their answers; one that was asked twice is there twice.
        first: whether the pass begins with it. Behind a block at home, or a state that a hook has
            changed, the same tokens go on in another record.
    """

    position: int
    tokens: int
    rows: int
    began: float
    ended: float
    hops: tuple[HopTimes, ...]
    first: bool = True


class HopBlocks(NamedTuple):
    """A server has computed blocks ``[start, end)``."""

    peer: str
    name: str
    start: int
    end: int


class PassRecord(NamedTuple):
    """As `StepRecord`, without a cache: states that are collected, training. No times of parts."""

    tokens: int
    rows: int
    began: float
    ended: float
    hops: tuple[HopBlocks, ...]
    first: bool


class Failover(NamedTuple):
    """A server was lost, and blocks ``[start, end)`` continue on another one."""

    peer: str
    name: str
    start: int
    end: int
    reason: str
    when: float

    @classmethod
    def of(cls, lost: RouteSegment, reason: object) -> Failover:
        """One that happens now."""
        name, now = lost.span.name, time.perf_counter()
        return cls(lost.peer, name, lost.start, lost.end, str(reason), now)


Event = StepRecord | PassRecord | Failover


class Timeline:
    """The steps of one generation.

    Attributes:
        began: when the notebook began to prepare it.
        written: how many tokens of each sequence came out, once it has ended.
    """

    def __init__(self, began: float):
        self.began = began
        self.written: int | None = None
        self.steps: deque[StepRecord] = deque(maxlen=MAX_STEPS)
        self.failovers: list[Failover] = []


class Subscription:
    """Events as they come; use it as a context manager, or `close` it.

    ``for event in subscription`` waits for the next one and ends after `close`.

    Attributes:
        before: tokens times sequences that had passed when it began.
    """

    before: int

    def __init__(self, telemetry: Telemetry, size: int):
        self._telemetry, self.before = telemetry, telemetry.tokens
        self._waiting: deque[Event] = deque(maxlen=size)
        self._arrived = threading.Event()
        self._open = True

    def drain(self) -> list[Event]:
        """The events since the last call, the oldest first; returns at once."""
        found = []
        while self._waiting:
            found.append(self._waiting.popleft())
        return found

    def wait(self, seconds: float | None = None) -> list[Event]:
        """As `drain`, but if there is none, wait for it up to ``seconds`` (None: until `close`)."""
        self._arrived.clear()
        if not self._waiting and self._open:
            self._arrived.wait(seconds)
        return self.drain()

    def close(self) -> None:
        """Receive nothing more; whoever waits gets what there is."""
        self._open = False
        self._telemetry.leave(self)
        self._arrived.set()

    def _put(self, event: Event) -> None:
        self._waiting.append(event)
        self._arrived.set()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while not self._waiting:
            if not self._open:
                raise StopIteration
            self._arrived.clear()
            if not self._waiting and self._open:
                self._arrived.wait()
        return self._waiting.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class ServerUsage:
    """What one server got from this notebook, and gave.

    Attributes:
        name: what it calls itself.
        meter: bytes on its streams.
        requests: how many it has answered.
        tokens: tokens times sequences that went through it, once per pass.
        seconds: of waiting for its answers.
        last: when it was last asked, in seconds of Unix time.
        blocks: the spans for which it was asked.
        token_seconds: how long one token takes there and back, smoothed, by span.
    """

    name: str = ""
    meter: ByteMeter = field(default_factory=ByteMeter)
    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0
    last: float = 0.0
    blocks: set[tuple[int, int]] = field(default_factory=set)
    token_seconds: dict[tuple[int, int], float] = field(default_factory=dict)

    def copy(self) -> ServerUsage:
        """As it is now, for another thread."""
        return replace(
            self,
            meter=replace(self.meter),
            blocks=set(self.blocks),
            token_seconds=dict(self.token_seconds),
        )


class Usage:
    """What each server got from this notebook, and gave: bytes, requests, tokens, seconds.

    Kept for as long as the notebook is attached, whatever became of the server since: a peer that
    has once received activations has seen them. The network thread writes; other threads read
    copies. Waiting for several servers at once counts for each of them, so seconds may add up to
    more than passed.
    """

    def __init__(self) -> None:
        self._servers: defaultdict[str, ServerUsage] = defaultdict(ServerUsage)

    def open(self, segment: RouteSegment) -> ByteMeter:
        """A stream to this server begins: what counts its bytes."""
        usage = self._servers[segment.peer]
        usage.name, usage.last = segment.span.name, time.time()
        usage.blocks.add((segment.start, segment.end))
        return usage.meter

    def passed(self, step: StepRecord) -> None:
        """A step of a session went through its servers."""
        now, tokens = time.time(), step.tokens * step.rows
        for hop in step.hops:
            usage = self._servers[hop.peer]
            seconds = hop.serialisation + hop.network + hop.queue + hop.compute
            usage.tokens += tokens
            usage.seconds += seconds
            usage.last = now
            if tokens == 1:
                span = (hop.start, hop.end)
                known = usage.token_seconds.get(span, seconds)
                usage.token_seconds[span] = known + SMOOTHING * (seconds - known)

    def received(self, segment: RouteSegment) -> None:
        """A request of a session was answered; what it took comes with the step."""
        self._servers[segment.peer].requests += 1

    def answered(self, segment: RouteSegment, tokens: int, seconds: float) -> None:
        """A request without a session was answered."""
        usage = self._servers[segment.peer]
        usage.requests += 1
        usage.tokens += tokens
        usage.seconds += seconds
        usage.last = time.time()

    def requests(self, peer: str) -> int:
        """How many requests a server has answered to this notebook."""
        return self._servers[peer].requests if peer in self._servers else 0

    def by_peer(self) -> dict[str, ServerUsage]:
        """Copies, by peer."""
        return {peer: usage.copy() for peer, usage in list(self._servers.items())}


class Telemetry:
    """Takes what the network thread reports, and passes it on.

    Attributes:
        latest: the generation that was last begun.
        usage: what each server got and gave since the notebook was attached.
        tokens: tokens times sequences that have passed since then.
    """

    def __init__(self) -> None:
        self.latest: Timeline | None = None
        self.tokens: int = 0
        self.usage: Usage = Usage()
        self._subscriptions: tuple[Subscription, ...] = ()
        self._lock = threading.Lock()

    def begin(self, began: float) -> Timeline:
        """A generation begins."""
        self.latest = Timeline(began)
        return self.latest

    def passed(self, timeline: Timeline, step: StepRecord) -> None:
        """Tokens of a session have passed blocks."""
        if step.first or not timeline.steps:
            timeline.steps.append(step)
        else:
            begun = timeline.steps[-1]
            timeline.steps[-1] = begun._replace(ended=step.ended, hops=begun.hops + step.hops)
        self.usage.passed(step)
        self.publish(step)

    def lost(self, timeline: Timeline | None, failover: Failover) -> None:
        """A server was lost, in a generation or (None) in a pass without a cache."""
        if timeline is not None:
            timeline.failovers.append(failover)
        self.publish(failover)

    def subscribe(self, size: int = MAX_EVENTS) -> Subscription:
        """Receive what happens from now on; at most ``size`` events wait."""
        with self._lock:
            subscription = Subscription(self, size)
            self._subscriptions = (*self._subscriptions, subscription)
        return subscription

    def leave(self, subscription: Subscription) -> None:
        with self._lock:
            left = [other for other in self._subscriptions if other is not subscription]
            self._subscriptions = tuple(left)

    def publish(self, event: Event) -> None:
        """Tell all that have subscribed; what counts, `usage` was told before."""
        with self._lock:
            if not isinstance(event, Failover) and event.first:
                self.tokens += event.tokens * event.rows
            for subscription in self._subscriptions:
                subscription._put(event)
