"""What happens while tokens pass through the swarm, for whoever wants to watch.

The network thread publishes; any number of subscriptions, each read in a thread of its own,
receive. A subscription holds a bounded number of events and forgets the oldest: a reader that is
slow or gone costs nothing. The steps of the latest generation are kept as well, for `trace`.

An event is a `Step` (tokens have passed all blocks) or a `Failover` (a server was lost). All
times are seconds; moments are those of `time.perf_counter`.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple, Self

from swarm_notebook.client.ledger import Ledger

MAX_STEPS = 4096
MAX_EVENTS = 1024


class HopTimes(NamedTuple):
    """One trip to a server: blocks ``[start, end)``, and the seconds of its parts.

    ``network`` is what lies between the others: both ways, and all that the operating systems and
    network daemons do. Petals' servers do not report their part, which then counts as network.
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
        """Two trips to the same blocks as one."""
        if other is None:
            return self
        parts = [mine + theirs for mine, theirs in zip(self[4:], other[4:], strict=True)]
        return HopTimes(*self[:4], *parts)


class Step(NamedTuple):
    """``tokens`` of ``rows`` sequences each, from ``position`` on, went through the blocks.

    Attributes:
        began: when the notebook's network thread got the step.
        ended: when it had the result.
        hops: the servers in the order of their answers; one that was asked twice is there twice.
    """

    position: int
    tokens: int
    rows: int
    began: float
    ended: float
    hops: tuple[HopTimes, ...]


class Failover(NamedTuple):
    """A server was lost, and blocks ``[start, end)`` continue on another one."""

    peer: str
    name: str
    start: int
    end: int
    reason: str
    when: float


Event = Step | Failover


class Timeline:
    """The steps of one generation.

    Attributes:
        began: when the notebook began to prepare it.
    """

    def __init__(self, began: float):
        self.began = began
        self.steps: deque[Step] = deque(maxlen=MAX_STEPS)
        self.failovers: list[Failover] = []


class Subscription:
    """Events as they come; use it as a context manager, or `close` it.

    ``for event in subscription`` waits for the next one and ends after `close`.
    """

    def __init__(self, events: Events, size: int):
        self._events = events
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
        self._events.leave(self)
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


class Events:
    """Where the network thread says what happens.

    Attributes:
        latest: the generation that was last begun.
        ledger: what each server got and gave since the notebook was attached.
    """

    def __init__(self) -> None:
        self.latest: Timeline | None = None
        self.ledger = Ledger()
        self._subscriptions: tuple[Subscription, ...] = ()
        self._lock = threading.Lock()

    def begin(self, began: float) -> Timeline:
        """A generation begins."""
        self.latest = Timeline(began)
        return self.latest

    def passed(self, timeline: Timeline, step: Step) -> None:
        """Tokens have passed all blocks."""
        timeline.steps.append(step)
        self.ledger.passed(step)
        self._publish(step)

    def lost(self, timeline: Timeline | None, failover: Failover) -> None:
        """A server was lost, in a generation or (None) in a pass without a cache."""
        if timeline is not None:
            timeline.failovers.append(failover)
        self._publish(failover)

    def subscribe(self, size: int = MAX_EVENTS) -> Subscription:
        """Receive what happens from now on; at most ``size`` events wait."""
        subscription = Subscription(self, size)
        with self._lock:
            self._subscriptions = (*self._subscriptions, subscription)
        return subscription

    def leave(self, subscription: Subscription) -> None:
        """End a subscription."""
        with self._lock:
            left = [other for other in self._subscriptions if other is not subscription]
            self._subscriptions = tuple(left)

    def _publish(self, event: Event) -> None:
        for subscription in self._subscriptions:
            subscription._put(event)
