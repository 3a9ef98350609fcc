"""What happens to servers and to the notebook, one thing at a time on each lane."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
from support.networks import Networks

from chaos.servers import Server
from chaos.told import Fault, Told

# What a server of each span may have instead, so that all blocks keep a second server.
OTHER_SPANS = {(0, 2): (0, 3), (2, 4): (1, 4), (4, 5): (3, 5)}
OTHER_SPANS |= {other: span for span, other in OTHER_SPANS.items()}
# How long something is out of order; longer than a request takes, and than two signs of life.
FAULT_SECONDS = (0.5, 5.0)
SLEEP_SECONDS = (1.0, 15.0)
# The swarm is let alone so long between two faults of a lane.
CALM_SECONDS = (0.2, 1.5)
# A server whose clock is off, by as much as is allowed and a little less.
CLOCK_SECONDS = (-50, 50)
_clocks = threading.Lock()
TWIN_SECONDS = 10.0
INTERRUPTS, INTERRUPT_SECONDS = 3, 15.0


class Lane:
    """Faults of one seed, one after the other, until it is told to stop.

    They come from a deck that is shuffled anew when it is used up: each comes as often as it is in
    the deck, and none is missing for long.

    Attributes:
        where: whom the present one befalls.
        covered: whether another server has the blocks.
    """

    calm = CALM_SECONDS
    where, covered = "the notebook", True

    def __init__(self, told: Told, seed: int):
        self.told, self.dice = told, random.Random(seed)
        self._deck: list[Callable[[], None]] = []

    def deck(self) -> list[Callable[[], None]]:
        """The faults, each as often as it comes."""
        raise NotImplementedError

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(self.dice.uniform(*self.calm)):
            if not self._deck:
                self._deck = self.deck()
                self.dice.shuffle(self._deck)
            fault = self._deck.pop()
            self.prepare()
            began = time.monotonic()
            fault()
            done = Fault(fault.__name__, began, time.monotonic(), self.where, self.covered)
            with self.told.lock:
                self.told.faults.append(done)

    def prepare(self) -> None:
        """Before each fault."""

    def _a_while(self) -> None:
        time.sleep(self.dice.uniform(*FAULT_SECONDS))


class PairLane(Lane):
    """Faults of two servers with the same blocks, of which one is never restarted on purpose."""

    def __init__(
        self,
        told: Told,
        seed: int,
        servers: Sequence[Server],
        restarted: Server,
        steady: Server,
        networks: Networks | None,
    ):
        super().__init__(told, seed)
        self.servers, self.restarted, self.networks = servers, restarted, networks
        self._both = (restarted, steady)

    def deck(self) -> list[Callable[[], None]]:
        restarts = [self.kill, self.leave, self.another_span, self.twin, self.clock]
        if self.restarted is self.servers[0]:
            restarts.append(self.bootstrap_gone)
        others = [self.stop, self.stop_daemon, self.memory, self.disk]
        if self.networks is not None:
            others += [self.partition]
            if self.networks.shapes:
                others += [self.loss, self.slow]
        return restarts + 2 * others

    def prepare(self) -> None:
        """Start servers again that have ended by themselves, as without memory they may."""
        for server in self._both:
            if not server.running:
                with self.told.lock:
                    self.told.counts["servers ended by themselves"] += 1
                server.again()
        self._befalls(self.restarted)

    def stop(self) -> None:
        """A machine that stands still: the connections stay, nobody answers."""
        server = self._one()
        server.signal(signal.SIGSTOP)
        self._a_while()
        server.signal(signal.SIGCONT)

    def stop_daemon(self) -> None:
        daemons = self._one().daemons()
        for daemon in daemons:
            daemon.suspend()
        self._a_while()
        for daemon in daemons:
            daemon.resume()

    def kill(self) -> None:
        self.restarted.kill()
        self._a_while()
        self._again()

    def leave(self) -> None:
        process = self.restarted.process
        assert process is not None
        process.terminate()
        process.wait()
        self._again()

    def another_span(self) -> None:
        self.restarted.kill()
        self.restarted.blocks = OTHER_SPANS[self.restarted.blocks]
        self._again()

    def clock(self) -> None:
        """All that are off are off in one direction: servers refuse who differs by more."""
        ahead = self.dice.choice(CLOCK_SECONDS)
        with _clocks:
            ahead = next((one.ahead for one in self.servers if one.ahead), ahead)
            self.restarted.ahead = ahead
        self._again(ahead)

    def twin(self) -> None:
        """A second server with the same identity, at another address."""
        server = self.restarted
        twin = Server(server.number, server.folder, server.place)
        twin.prefix, twin.key, twin.peers = server.prefix, server.key, [server.address]
        twin.listen, twin.blocks = server.listen.rpartition("/")[0] + "/0", server.blocks
        twin.start()
        assert twin.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            twin.process.wait(TWIN_SECONDS)
        twin.kill()

    def bootstrap_gone(self) -> None:
        """The one whose address all others were given."""
        self.kill()

    def memory(self) -> None:
        """No more memory for a while: what is asked for beyond what it has fails."""
        server = self._one()
        taken = psutil.Process(server.pid).memory_info().vms
        with self._limited(server, resource.RLIMIT_AS, taken):
            self._a_while()

    def disk(self) -> None:
        """Nothing can be written for a while."""
        with self._limited(self._one(), resource.RLIMIT_FSIZE, 0):
            self._a_while()

    def partition(self) -> None:
        assert self.networks is not None
        with self.networks.cut(self._one().number):
            self._a_while()

    def loss(self) -> None:
        assert self.networks is not None
        with self.networks.shaped(self._one().number, "loss", f"{self.dice.randint(2, 30)}%"):
            self._a_while()

    def slow(self) -> None:
        assert self.networks is not None
        words = ("delay", "300ms", "100ms", "rate", "2mbit")
        with self.networks.shaped(self._one().number, *words):
            self._a_while()

    def _one(self) -> Server:
        return self._befalls(self.dice.choice(self._both))

    def _befalls(self, server: Server) -> Server:
        self.where = f"server-{server.number}"
        self.covered = all(other.running for other in self._both if other is not server)
        return server

    @contextlib.contextmanager
    def _limited(self, server: Server, what: int, limit: int) -> Iterator[None]:
        assert server.process is not None
        before = resource.prlimit(server.pid, what)
        resource.prlimit(server.pid, what, (limit, before[1]))
        try:
            yield
        finally:
            if server.running:
                resource.prlimit(server.pid, what, before)

    def _again(self, ahead: int = 0) -> None:
        server = self.restarted
        server.peers = [other.address for other in self.servers if other is not server]
        server.again(ahead)


class SleepLane(Lane):
    """The lid of the notebook is closed now and then."""

    calm = SLEEP_SECONDS

    def __init__(self, told: Told, seed: int, notebook: subprocess.Popen[str]):
        super().__init__(told, seed)
        self._notebook = notebook

    def deck(self) -> list[Callable[[], None]]:
        return [self.sleep]

    def sleep(self) -> None:
        os.killpg(self._notebook.pid, signal.SIGSTOP)
        time.sleep(self.dice.uniform(*SLEEP_SECONDS))
        os.killpg(self._notebook.pid, signal.SIGCONT)


class InterruptLane(Lane):
    """A notebook of its own, which is interrupted some times and then killed, again and again."""

    def __init__(self, told: Told, seed: int, start: Callable[[int], subprocess.Popen[str]]):
        super().__init__(told, seed)
        self._start = start

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            child = self._start(self.dice.randrange(1 << 30))
            try:
                self._disturb(child, stop)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            self._count("killed notebooks")

    def _disturb(self, child: subprocess.Popen[str], stop: threading.Event) -> None:
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            self._wrong("a notebook ended before it began")
            return
        for _ in range(self.dice.randint(1, 6)):
            if stop.wait(self.dice.uniform(0.2, 3)):
                return
            if not self._interrupt(child):
                return
            self._count("interrupts")
        stop.wait(self.dice.uniform(0, 1))

    def _interrupt(self, child: subprocess.Popen[str]) -> bool:
        """Interrupt it, again if need be: Python drops what strikes in a finalizer."""
        output: Any = child.stdout
        for _ in range(INTERRUPTS):
            child.send_signal(signal.SIGINT)
            if select.select([output], [], [], INTERRUPT_SECONDS)[0]:
                said = output.readline()
                if said != "interrupted\n":
                    self._wrong(f"an interrupted notebook said {said!r}")
                return bool(said == "interrupted\n")
        self._wrong("a notebook did not notice that it was interrupted")
        return False

    def _count(self, what: str) -> None:
        with self.told.lock:
            self.told.counts[what] += 1

    def _wrong(self, text: str) -> None:
        with self.told.lock:
            self.told.errors.append(text)
            self.told.unclear.append(text)
