"""A swarm as events: servers that batch what waits, notebooks that wait for tokens, links between.

    swarm = Simulation(shape, link, route, notebook)
    swarm.add("a", share)                  # a server, at once; `at` says when else
    swarm.open("me", prompt=512, answer=128)
    swarm.run(60.0)
    swarm.tokens["me"]                     # when each token was there

Seconds are those of `placement`, so those of `sn.plan`, which asks `rate_together` what several
streams have. A server computes one thing at a time, as ours do: steps that have come while it was
busy become one batch, and one piece of a prompt comes between two batches. Which servers a stream
takes is asked of `route`, and where servers are is the caller's to decide: so the code of the
product decides in it, unchanged. A stream whose server has gone asks again, and brings the new ones
up to where it was.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial

from swarm_notebook.planning.machines import Link, Machine
from swarm_notebook.planning.placement import (
    Demand,
    Share,
    hop_seconds,
    notebook_seconds,
    prompt_seconds,
    step_seconds,
)
from swarm_notebook.planning.shape import ModelShape

# A server's largest batch of steps, and its largest piece of a prompt (`server/engine/scheduling`).
MOST_ROWS, PIECE_TOKENS = 256, 1024
# A server that has died is missed after so long: a sign of life is asked for after 0.5 s, and may
# take 2.5 (`client/watch.py`).
MISSED_SECONDS = 3.0
# Between two looks for servers of blocks that nobody has (`client/servers/waiting.py`).
RETRY_SECONDS = 0.5

# What `rate_together` reckons with: as many tokens of each stream as these events allow.
_MOST_TOKENS, _LEAST_TOKENS, _MOST_EVENTS = 64, 4, 200_000

# Blocks ``[start, end)`` on the server of this name.
SimulatedHop = tuple[str, int, int]
# The hops of a stream by its notebook's name; none while some block has no server.
Router = Callable[[str, int], Sequence[SimulatedHop]]


@dataclass
class _Job:
    stream: _Stream
    tokens: int
    start: int
    end: int


@dataclass
class _Host:
    share: Share
    steps: deque[_Job] = field(default_factory=deque)
    prompts: deque[_Job] = field(default_factory=deque)
    running: list[_Job] = field(default_factory=list)
    was_prompt: bool = False
    answered: dict[str, int] = field(default_factory=lambda: defaultdict(int))


# A stream waits for so many seconds, or for a job on a server; it hears whether that was answered.
_Stream = Generator[float | tuple[str, int, int, int], bool | None, None]


class Simulation:
    """A swarm in simulated time.

    Args:
        shape: of the model.
        link: between two peers, by their names; how many tokens travel is counted.
        route: the servers for a prompt of so many tokens.
        notebook: what each notebook runs on.
        context: positions behind each token; their keys and values take time to read.

    Attributes:
        now: seconds since it began.
        hosts: the servers that are there.
        tokens: when each token was there, by notebook.
    """

    now: float

    def __init__(
        self,
        shape: ModelShape,
        link: Callable[[str, str], Link],
        route: Router,
        notebook: Machine,
        context: int = 0,
    ):
        self.now = 0.0
        self.hosts: dict[str, _Host] = {}
        self.tokens: dict[str, list[float]] = defaultdict(list)
        self._shape, self._link, self._route, self._notebook = shape, link, route, notebook
        self._context = context
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._told: set[str] = set()  # those that have said that they go
        self._seconds: dict[tuple[Machine, float, int, int, int, bool], float] = {}

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Do something at that time."""
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def add(self, name: str, share: Share) -> None:
        """A server is there, with its blocks loaded."""
        self._told.discard(name)
        self.hosts[name] = _Host(share)

    def remove(self, name: str, *, told: bool = False) -> None:
        """A server goes; who waits for it learns it at once if it was told."""
        gone = self.hosts.pop(name)
        seconds = 0.0 if told else MISSED_SECONDS
        if told:
            self._told.add(name)
        for job in (*gone.steps, *gone.prompts, *gone.running):
            self._later(seconds, job.stream, False)

    def open(self, notebook: str, prompt: int, answer: int, pause: float = 0.0) -> None:
        """A notebook asks for one answer after the other, with a pause of so many seconds."""
        stream = self._conversation(notebook, prompt, answer, pause)
        self._later(0.0, stream, None)

    def answered(self, server: str) -> dict[str, int]:
        """Requests that a server has answered, by notebook."""
        return self.hosts[server].answered

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = until

    def _later(self, seconds: float, stream: _Stream, answered: bool | None) -> None:
        self.at(self.now + seconds, lambda: self._resume(stream, answered))

    def _resume(self, stream: _Stream, answered: bool | None) -> None:
        wanted = stream.send(answered)
        if not isinstance(wanted, tuple):
            self._later(wanted, stream, True)
            return
        name, tokens, start, end = wanted
        host = self.hosts.get(name)
        if host is None:
            self._later(0.0 if name in self._told else MISSED_SECONDS, stream, False)
            return
        (host.steps if tokens == 1 else host.prompts).append(_Job(stream, tokens, start, end))
        if not host.running:
            self._work(name, host)

    def _work(self, name: str, host: _Host) -> None:
        """Begin what is next on a server."""
        if self.hosts.get(name) is not host:
            return
        if host.prompts and (host.was_prompt is False or not host.steps):
            host.running, host.was_prompt = [host.prompts.popleft()], True
        elif host.steps:
            # Only steps through the same blocks share a call (`server/engine/steps/batching.py`).
            first = host.steps[0]
            same = [job for job in host.steps if (job.start, job.end) == (first.start, first.end)]
            host.running, host.was_prompt = same[:MOST_ROWS], False
            taken = set(map(id, host.running))
            host.steps = deque(job for job in host.steps if id(job) not in taken)
        else:
            host.running = []
            return
        start = min(job.start for job in host.running)
        end = max(job.end for job in host.running)
        count = sum(job.tokens for job in host.running)
        seconds = self._compute(host.share, start, end, count, host.was_prompt)
        self.at(self.now + seconds, lambda: self._worked(name, host))

    def _worked(self, name: str, host: _Host) -> None:
        if self.hosts.get(name) is not host:
            return
        done, host.running = host.running, []
        for job in done:
            self._resume(job.stream, True)
        if not host.running:
            self._work(name, host)

    def _compute(self, share: Share, start: int, end: int, count: int, prompt: bool) -> float:
        key = (share.machine, share.bits, start, end, count, prompt)
        if key not in self._seconds:
            part = Share(share.machine, start, end, share.bits, 0, 0)
            self._seconds[key] = (
                prompt_seconds(self._shape, part, count)
                if prompt
                else step_seconds(self._shape, part, count, self._context, None)
            )
        return self._seconds[key]

    def _conversation(self, notebook: str, prompt: int, answer: int, pause: float) -> _Stream:
        while True:
            done, caught_up, chain = 0, set[SimulatedHop](), list[SimulatedHop]()
            while done < answer:
                if not chain:
                    chain = list(self._route(notebook, prompt + done))
                    caught_up &= set(chain)
                if not chain:
                    yield RETRY_SECONDS
                elif (yield from self._through(notebook, chain, caught_up, prompt + done)):
                    last = self._link(chain[-1][0], notebook)
                    yield notebook_seconds(self._shape, self._notebook, last)
                    self.tokens[notebook].append(self.now)
                    done += 1
                else:
                    chain = []
            yield pause

    def _through(
        self,
        notebook: str,
        chain: Sequence[SimulatedHop],
        caught_up: set[SimulatedHop],
        tokens: int,
    ) -> Generator[float | tuple[str, int, int, int], bool | None, bool]:
        """One pass; whether all servers were there."""
        at = notebook
        for hop in chain:
            server, start, end = hop
            # What a new server has to catch up with goes through it in pieces.
            left = 1 if hop in caught_up else tokens
            yield hop_seconds(self._shape, self._link(at, server), min(left, PIECE_TOKENS))
            while left:
                piece = min(left, PIECE_TOKENS)
                if not (yield (server, piece, start, end)):
                    return False
                left -= piece
            caught_up.add(hop)
            if server in self.hosts:
                self.hosts[server].answered[notebook] += 1
            at = server
        return True


def rate_together(
    shape: ModelShape, shares: Sequence[Share], notebook: Machine, demand: Demand, link: Link
) -> float:
    """Tokens per second of ``demand.sessions`` streams through a chain, each of its own notebook.

    Every stream is in the middle of its context. They begin one after the other within the time of
    a token, and what counts is the second half of what is simulated.
    """
    context, count = demand.context // 2, demand.sessions
    chain = [(str(number), one.start, one.end) for number, one in enumerate(shares)]
    made = Simulation(shape, lambda _, __: link, lambda _, __: chain, notebook, context)
    for (name, _, _), share in zip(chain, shares, strict=True):
        made.add(name, share)
    alone = sum(step_seconds(shape, share, 1, context, None) for share in shares)
    for number in range(count):
        begin = partial(made.open, str(number), prompt=1, answer=_MOST_EVENTS)
        made.at(alone * number / count, begin)
    each = _MOST_EVENTS // (count * len(shares))
    wanted = count * min(max(each, _LEAST_TOKENS), _MOST_TOKENS)
    while sum(map(len, made.tokens.values())) < wanted:
        made.run(made.now + alone)
    half = made.now / 2
    return sum(when > half for one in made.tokens.values() for when in one) / half
