"""Servers that choose their blocks come and go while notebooks work (``make churn``).

    PYTHONPATH=tests python -m chaos.places [--seconds 300] [--seed 0] [--servers 6] [--losses 5]

Six servers of a tiny Llama, real processes, each with room for two or three of its five blocks and
nobody who says which. At random, about every ten seconds, one is killed or told to leave or comes
back, so that those that stay have room for all blocks and some more; where root may make network
namespaces, half of the servers are also cut off for half a minute. At last one is killed that alone
has some of the blocks, some times over. Meanwhile a notebook generates and trains, another one does
anything, and both compare all with the local model.

What is told at the end: how long blocks were without a server that is ready and not cut off, as the
servers' processes say themselves and not as the swarm believes, and how long after a server that
alone had them (``retaken_s``); how often servers moved; and what notebooks had of it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch
from support import forkserver
from support.networks import Networks
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

from chaos.__main__ import networks_if_allowed
from chaos.told import Told, say
from swarm_notebook.local.process import start_server

BLOCKS = 5
PAUSE_SECONDS = 10.0  # between two events, on average
CUT_SECONDS = 30.0
# Of those that are up, the room for blocks that stays, as a part of the blocks.
ROOM = 1.6
START_SECONDS, LEAVE_SECONDS = 120.0, 45.0
# Between two lines for whoever looks for the servers.
LOOK_SECONDS = 1.0
# Reads where servers are, line by line, as they may go elsewhere just then, until the swarm tells
# of all of them through these.
LOOK = """
import sys, time, swarm_notebook as sn
folder, names = sys.argv[1:]
began = None
for line in sys.stdin:
    began = began or time.monotonic()
    try:
        found = sn.look(line.split(), model=folder)
    except sn.errors.ConnectionFailed:
        continue
    if set(names.split()) <= {row.name for row in found.servers}:
        break
print(time.monotonic() - began)
"""


class Chooser:
    """A server that chooses its blocks, and what its process says of them.

    Attributes:
        held: the blocks that it serves now; None while it serves none.
        reached: nobody has cut it off.
        moves: how often it has taken others by itself.
        ended: how often its process has ended and nobody had told it to.
    """

    def __init__(self, number: int, size: int, command: Sequence[str], log: Path):
        self.number, self.size, self._command, self._log = number, size, command, log
        self.held: tuple[int, int] | None = None
        self.moves, self.ended, self.addresses = 0, 0, list[str]()
        self.reached = True
        self._process: subprocess.Popen[str] | None = None

    @property
    def up(self) -> bool:
        return self._process is not None

    def __str__(self) -> str:
        said = self._log.read_text().splitlines() if self._log.exists() else []
        state = f"serves {self.held}" if self.held else "is not ready" if self.up else "is not up"
        return "\n    ".join([f"server-{self.number} {state}", *said[-8:]])

    def start(self, peers: Sequence[str]) -> None:
        joining = ["--initial-peers", *peers] if peers else []
        with self._log.open("a") as log:
            self._process = start_server([*self._command, *joining], log)
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def end(self, number: int) -> None:
        """End it by a signal; wait until it is gone."""
        process, self._process = self._process, None
        assert process is not None
        if number == signal.SIGKILL:
            self.held, self.addresses = None, []
        # To leave in good order, a server needs its daemon for a moment.
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
        try:
            process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.held, self.addresses = None, []

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        before: tuple[int, int] | None = None
        for line in process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                told = json.loads(line)
                if self._process is not process:
                    return
                self.addresses = told.get("maddrs", self.addresses)
                self.held = tuple(told["blocks"]) if told.get("ready") else None
                if self.held is not None:
                    self.moves += before not in {None, self.held}
                    before = self.held
        if self._process is process:
            say(f"{self} and has ended by itself")
            self._process, self.held, self.addresses = None, None, []
            self.ended += 1


class Holes:
    """Watches which blocks nobody serves, twenty times a second."""

    def __init__(self, servers: Sequence[Chooser]):
        self._servers, self._stop = servers, threading.Event()
        self.found: list[float] = []
        self._thread = threading.Thread(target=self._watch)

    @property
    def there(self) -> bool:
        held = [server.held for server in self._servers if server.reached]
        return {block for span in held if span for block in range(*span)} != set(range(BLOCKS))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        began: float | None = None
        while not self._stop.wait(0.05):
            if self.there:
                began = began or time.monotonic()
            elif began is not None:
                self.found.append(time.monotonic() - began)
                began = None
        if began is not None:
            self.found.append(time.monotonic() - began)


class Run:
    """The servers and the events."""

    def __init__(
        self, servers: Sequence[Chooser], networks: Networks | None, folder: Path, seed: int
    ):
        self.servers, self.networks, self.random = servers, networks, random.Random(seed)
        self.folder = folder
        self.events: Counter[str] = Counter()
        self.healed: float | None = None

    def join(self, server: Chooser) -> None:
        server.start([one for other in self.servers if other.up for one in other.addresses])

    def event(self) -> None:
        """One server comes or goes."""
        there = [server for server in self.servers if server.held]
        gone = [server for server in self.servers if not server.up]
        room = sum(server.size for server in there)
        # The first stays, as an address that others keep.
        spare = [one for one in there[1:] if room - one.size >= ROOM * BLOCKS]
        if gone and (not spare or self.random.random() < 0.5):
            self.join(self.random.choice(gone))
            self.events["joined"] += 1
        elif spare:
            kind = self.random.choice(["killed", "left"])
            server = self.random.choice(spare)
            server.end(signal.SIGKILL if kind == "killed" else signal.SIGTERM)
            self.events[kind] += 1

    def lose(self) -> float | None:
        """Kill one that alone has some blocks; seconds until others serve all; None if none is.

        Others leave first, until there is one; those that are left have room for all blocks.
        """
        while True:
            there = [server for server in self.servers if server.held]
            room = sum(server.size for server in there)
            able = [one for one in there[1:] if room - one.size >= BLOCKS]
            alone = [one for one in able if self._alone(one, there)]
            if alone:
                server = self.random.choice(alone)
                began = time.monotonic()
                server.end(signal.SIGKILL)
                wait(lambda: not Holes(self.servers).there, self.servers)
                return time.monotonic() - began
            if not able:
                return None
            self.random.choice(able).end(signal.SIGTERM)
            wait(lambda: not Holes(self.servers).there, self.servers)

    @staticmethod
    def _alone(server: Chooser, there: Sequence[Chooser]) -> bool:
        others = {
            block for one in there if one is not server for block in range(*one.held or (0, 0))
        }
        return not set(range(*server.held or (0, 0))) <= others

    def restore(self, servers: Sequence[Chooser]) -> None:
        """These servers are there again, and ready."""

        def ready() -> bool:
            for server in servers:
                if not server.up:
                    self.join(server)
            return all(server.held for server in servers)

        wait(ready, self.servers)

    def cut(self) -> None:
        """Half of the servers cannot be reached for a time, each by itself.

        All of the other half are up before: notebooks, which are on that side, have room for all
        blocks there.
        """
        assert self.networks is not None
        self.restore(self.servers[: len(self.servers) // 2])
        names = " ".join(f"server-{one.number}" for one in self.servers if one.up)
        command = [*self.networks.prefix(len(self.servers)), sys.executable, "-c", LOOK]
        command += [str(self.folder), names]
        looking = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        lost = self.servers[len(self.servers) // 2 :]
        say(f"cut off: {[server.held for server in lost]}; left: {self._places()}")
        with contextlib.ExitStack() as stack:
            for server in lost:
                stack.enter_context(self.networks.cut(server.number))
                server.reached = False
            time.sleep(CUT_SECONDS)
        say(f"healed: {self._places()}")
        for server in lost:
            server.reached = True
        self.events["cut"] += 1
        deadline = time.monotonic() + START_SECONDS
        assert looking.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            while looking.poll() is None and time.monotonic() < deadline:
                # Those that were never cut off, where they are now.
                there = [one for server in self.servers[: -len(lost)] for one in server.addresses]
                looking.stdin.write(" ".join(there) + "\n")
                looking.stdin.flush()
                time.sleep(LOOK_SECONDS)
        looking.kill()
        said, _ = looking.communicate()
        self.healed = float(said) if said else None

    def _places(self) -> list[tuple[int, int] | None]:
        return [server.held for server in self.servers if server.reached]


def servers_for(folder: Path, place: Path, count: int, networks: Networks | None) -> list[Chooser]:
    """Some with room for two blocks, some for three."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    block = max(sum(4 * one.numel() for one in layer.parameters()) for layer in model.model.layers)
    made = []
    for number in range(count):
        prefix = networks.prefix(number) if networks else ()
        host = networks.address(number) if networks else "127.0.0.1"
        size = 2 + number % 2
        command = [*prefix, sys.executable, "-m", "swarm_notebook.cli", "serve", str(folder)]
        command += ["--memory", str(size * block), "--bits", "16", "--dtype", "float32"]
        command += ["--threads", "1", "--cache-tokens", "4096", "--exit-with-stdin"]
        command += ["--host-maddrs", f"/ip4/{host}/tcp/0", "--name", f"server-{number}"]
        made.append(Chooser(number, size, command, place / f"{number}.log"))
    return made


@contextlib.contextmanager
def notebook(kind: str, peers: Sequence[str], folder: Path, told: Told, prefix: Sequence[str]):
    command = [*prefix, sys.executable, "-m", "chaos", "--notebook", kind, str(folder)]
    process = subprocess.Popen(
        [*command, "--peers", *peers], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    reading = threading.Thread(target=told.read, args=(process.stdout,))
    reading.start()
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reading.join()


def wait(
    ready: Callable[[], object], servers: Sequence[Chooser], seconds: float = START_SECONDS
) -> None:
    """Raises: RuntimeError: it does not become true in time; it tells what servers say."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            told = "\n".join(map(str, servers))
            raise RuntimeError(f"the swarm does not become whole:\n{told}")
        time.sleep(0.1)


def work(run: Run, seconds: float, holes: Holes) -> None:
    """Events for so long, at last a cut; then the swarm is left alone until it is whole."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(run.random.uniform(0.5, 1.5) * PAUSE_SECONDS)
        run.event()
    wait(lambda: not holes.there, run.servers)
    if run.networks is not None:
        run.cut()
    wait(lambda: not holes.there, run.servers)


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos.places", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--servers", type=int, default=6)
    parser.add_argument("--losses", type=int, default=5, help="of servers that alone have blocks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    forkserver.install()
    told = Told()
    with tempfile.TemporaryDirectory() as name, networks_if_allowed() as networks:
        place = Path(name)
        folder = tiny_model("llama", place)
        servers = servers_for(folder, place, options.servers, networks)
        run = Run(servers, networks, folder, options.seed)
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [one.end(signal.SIGKILL) for one in servers if one.up])
            for server in servers:
                run.join(server)
                wait(lambda server=server: server.held, servers)
            wait(lambda: not Holes(servers).there, servers)
            say(f"whole: {[server.held for server in servers]}")
            before = [server.moves for server in servers]
            peers = [address for server in servers for address in server.addresses]
            prefix = networks.prefix(len(servers)) if networks else ()
            for kind in ("works", "acts"):
                stack.enter_context(notebook(kind, peers, folder, told, prefix))
            wait(lambda: told.counts["tokens"] and told.counts["steps"], servers)
            with Holes(servers) as holes:
                work(run, options.seconds, holes)
            retaken = []
            for _ in range(options.losses):
                run.restore(servers)
                retaken.append(run.lose())
            moves = sum(server.moves for server in servers) - sum(before)
    for text, times in Counter(told.errors).items():
        say(f"{times} x {text}")
    gaps = [
        after - before
        for beats in told.beats.values()
        for before, after in itertools.pairwise(beats)
    ]
    print(
        json.dumps(
            {
                "events": dict(run.events),
                "moves": moves,
                "ended_by_themselves": sum(server.ended for server in servers),
                "holes": len(holes.found),
                "longest_hole_s": round(max(holes.found, default=0.0), 1),
                "median_hole_s": round(statistics.median(holes.found or [0.0]), 1),
                "retaken_s": [one and round(one, 1) for one in retaken],
                "healed_s": run.healed and round(run.healed, 1),
                "longest_pause_s": round(max(gaps, default=0.0), 1),
                "counts": dict(told.counts),
                "errors": len(told.errors),
            }
        )
    )
    bad = told.counts["wrong"] or told.counts["lost"] or told.unclear
    bad = bad or (networks is not None and run.healed is None)
    return 1 if bad or not told.counts["tokens"] else 0


if __name__ == "__main__":
    sys.exit(main())
