"""Crowds over a chain of servers in simulated time: how many tokens they have by the window's rule.

Calls and messages cost what they do on cards of one host: a 70B in bfloat16 on two of them takes
19 ms per call and hardly more for 32 rows, an 8B on one 5 ms. Each side reads and writes one
message after the other, with noise. All begin at once, and what counts is the time until the last
one has all of its tokens, as in ``benchmarks/gpu.py``.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from swarm_notebook.server.engine.scheduling.scheduler import Kind, Task
from swarm_notebook.server.engine.scheduling.window import BatchWindow

# Seconds of a message that a server reads, pushes to the next one, or answers; of a client's step.
READ, PUSH, ANSWER, CLIENT, HOP = 0.0001, 0.000125, 0.0001, 0.0008, 0.0003
PROCESSES, WARM, STEPS, SEEDS = 8, 8, 48, range(4)

Call = Callable[[int], float]


class Chain:
    """Servers one behind the other, and sessions that step through all of them."""

    def __init__(self, calls: Sequence[Call], sessions: int, noise: float, seed: int):
        self.now, self.noise, self.random = 10.0, noise, random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.servers = [Server(self, number, call) for number, call in enumerate(calls)]
        self._clients = [Thread(self) for _ in range(min(PROCESSES, sessions))]
        self._left = [0] * sessions

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def hop(self, what: Callable[[], None]) -> None:
        self.at(self.now + HOP * self.random.uniform(0.7, 1.8), what)

    def decode(self, steps: int) -> float:
        """So many steps of each session; seconds until all are done."""
        began = self.now
        self._left = [steps] * len(self._left)
        for session in range(len(self._left)):
            self._think(session)
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()
        return self.now - began

    def _think(self, session: int) -> None:
        client = self._clients[session % len(self._clients)]
        client.do(CLIENT, partial(self.hop, partial(self.servers[0].read, session)))

    def leave(self, server: int, sessions: Sequence[int]) -> None:
        """What shared a call goes on: all pushes first, and then the answers."""
        loop, following = self.servers[server].loop, self.servers[server + 1 :][:1]
        for session, other in itertools.product(sessions, following):
            loop.do(PUSH, partial(self.hop, partial(other.read, session)))
        for session in sessions:
            arrives = bool if following else partial(self._answered, session)
            loop.do(ANSWER, partial(self.hop, arrives))

    def _answered(self, session: int) -> None:
        self._left[session] -= 1
        if self._left[session]:
            self._think(session)


class Thread:
    """Does one thing after the other."""

    def __init__(self, chain: Chain):
        self._chain, self._free = chain, 0.0

    def do(self, seconds: float, then: Callable[[], None]) -> None:
        seconds *= self._chain.random.lognormvariate(0, self._chain.noise)
        self._free = max(self._free, self._chain.now) + seconds
        self._chain.at(self._free, then)


class Server:
    """A server's loop, and its torch thread, which waits as `ComputeThread` does."""

    def __init__(self, chain: Chain, number: int, call: Call):
        self.loop = Thread(chain)
        self._chain, self._number, self._call = chain, number, call
        self._window, self._waiting, self._busy = BatchWindow(), list[int](), False
        # A wait that is under way: its number, and how many steps end it.
        self._wait, self._enough = 0, 1

    def read(self, session: int) -> None:
        self.loop.do(READ, lambda: self._arrived(session))

    def _arrived(self, session: int) -> None:
        self._waiting.append(session)
        self._window.came(_task(session), self._chain.now)
        if not self._busy and len(self._waiting) >= self._enough:
            self._consider()

    def _consider(self) -> None:
        self._wait += 1
        wait, there = self._wait, len(self._waiting)
        patience = self._window.patience(there, self._chain.now)
        if not patience:
            self._run()
            return
        self._enough = there + self._window.awaited

        def over() -> None:
            if wait == self._wait and not self._busy:
                (self._consider if len(self._waiting) > there else self._run)()

        self._chain.at(self._chain.now + patience, over)

    def _run(self) -> None:
        self._busy, self._enough = True, 1
        taken, self._waiting = self._waiting, []
        seconds = self._call(len(taken)) * max(0.9, self._chain.random.gauss(1, 0.02))

        def ran() -> None:
            self._busy = False
            self._window.ran(map(_task, taken), seconds, self._chain.now)
            self._chain.leave(self._number, taken)
            if self._waiting:
                self._consider()

        self._chain.at(self._chain.now + seconds, ran)


def _task(session: int) -> Task:
    return Task(Kind.STEP, f"client {session}", 1, "blocks", session=session)


def half_of_70b(steps: int) -> float:
    return 0.019 + 0.000055 * steps


def whole_8b(steps: int) -> float:
    return 0.005 + 0.00006 * steps


def on_a_cpu(steps: int) -> float:
    return 0.003 + 0.003 * steps


def tokens_per_second(calls: Sequence[Call], sessions: int) -> float:
    """On average over quiet and noisy machines."""
    seconds = []
    for noise, seed in itertools.product((0.4, 0.8), SEEDS):
        chain = Chain(calls, sessions, noise, seed)
        chain.decode(WARM)
        seconds.append(chain.decode(STEPS))
    return sessions * STEPS * len(seconds) / sum(seconds)


@pytest.mark.parametrize(
    ("calls", "sessions", "least"),
    [
        # Without a wait for steps that keep coming: 510, 270 and 152.
        ([half_of_70b] * 2, 32, 555),
        ([half_of_70b] * 2, 16, 300),
        ([half_of_70b] * 2, 8, 163),
        # Nobody has less for it.
        ([half_of_70b] * 2, 2, 47),
        ([half_of_70b] * 2, 1, 24),
        ([whole_8b], 32, 2400),
        ([whole_8b], 8, 780),
        ([whole_8b], 2, 228),
        ([on_a_cpu] * 2, 8, 225),
        ([on_a_cpu] * 2, 2, 125),
    ],
)
def test_a_crowd_over_a_chain_shares_its_calls(
    calls: Sequence[Call], sessions: int, least: float
) -> None:
    assert tokens_per_second(calls, sessions) >= least
