"""Run it: servers, notebooks and faults, a warm-up and the rest."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from support import forkserver
from support.networks import Networks
from support.tiny import tiny_model

import chaos
from chaos import notebooks
from chaos.calm import compare, taken
from chaos.faults import InterruptLane, Lane, PairLane, SleepLane
from chaos.servers import PAIRS, SPANS, STEADY, Server
from chaos.told import AFTER_SECONDS, Told, say

NOTEBOOK = len(SPANS)  # the number of its namespace
START_SECONDS = 120.0
QUIET_SECONDS = 10.0  # before the first fault
KINDS = {
    "works": notebooks.work_without_a_break,
    "acts": notebooks.do_anything,
    "interrupted": notebooks.be_interrupted,
}


class Run:
    """The swarm, its notebooks, and what becomes of them."""

    def __init__(self, servers: Sequence[Server], networks: Networks | None, seed: int):
        self.servers, self.networks, self.seed = servers, networks, seed
        self.told, self._stop = Told(), threading.Event()
        self.steady = [servers[number] for number in STEADY]

    def phase(self, seconds: float) -> None:
        """Notebooks and faults for a time; then everybody leaves.

        Raises:
            RuntimeError: a notebook ended by itself.
        """
        self._stop.clear()
        with contextlib.ExitStack() as stack:
            working = stack.enter_context(self._telling("works"))
            acting = stack.enter_context(self._telling("acts"))
            self._await_beats()
            began = time.monotonic()
            self._stop.wait(QUIET_SECONDS)
            self.told.quiet = began, time.monotonic()
            lanes = self._lanes(working)
            threads = [threading.Thread(target=self._guarded, args=(lane,)) for lane in lanes]
            for thread in threads:
                thread.start()
            self._stop.wait(seconds)
            self._stop.set()
            for thread in threads:
                thread.join()
            for lane in lanes:
                lane.prepare()
            time.sleep(AFTER_SECONDS)
            self.told.end()
            if any(child.poll() is not None for child in (working, acting)):
                raise RuntimeError("a notebook ended by itself")
        self.seed += 1

    def calm(self) -> dict[int, Any]:
        """With nobody there: what the servers take that are never restarted."""
        with self._notebook("looks", 0, *(server.peer_id for server in self.steady)) as child:
            said, _ = child.communicate()
        return taken(self.steady, json.loads(said.splitlines()[-1]))

    def _lanes(self, working: subprocess.Popen[str]) -> list[Lane]:
        lanes: list[Lane] = [
            PairLane(
                self.told,
                self.seed + 1000 * pair,
                self.servers,
                self.servers[pair],
                self.servers[pair + PAIRS],
                self.networks,
            )
            for pair in range(PAIRS)
        ]
        lanes.append(SleepLane(self.told, self.seed, working))
        lanes.append(
            InterruptLane(self.told, self.seed, lambda seed: self._start("interrupted", seed))
        )
        return lanes

    def _guarded(self, lane: Lane) -> None:
        try:
            lane.run(self._stop)
        except Exception:
            with self.told.lock:
                self.told.unclear.append(traceback.format_exc())
                self.told.errors.append("a fault failed")
            self._stop.set()

    def _await_beats(self) -> None:
        deadline, before = time.monotonic() + START_SECONDS, dict(self.told.counts)
        while time.monotonic() < deadline:
            counts = self.told.counts
            if all(counts[name] > before.get(name, 0) for name in ("tokens", "steps")):
                return
            time.sleep(0.2)
        raise RuntimeError("the notebook did not begin")

    @contextlib.contextmanager
    def _telling(self, kind: str) -> Iterator[subprocess.Popen[str]]:
        with self._notebook(kind, self.seed) as child:
            assert child.stdout is not None
            reading = threading.Thread(target=self.told.read, args=(child.stdout,))
            reading.start()
            try:
                yield child
            finally:
                os.killpg(child.pid, signal.SIGKILL)
                reading.join()

    @contextlib.contextmanager
    def _notebook(self, kind: str, seed: int, *more: str) -> Iterator[subprocess.Popen[str]]:
        child = self._start(kind, seed, *more)
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def _start(self, kind: str, seed: int, *more: str) -> subprocess.Popen[str]:
        prefix = self.networks.prefix(NOTEBOOK) if self.networks else ()
        peers = [server.address for server in self.servers]
        command = [*prefix, sys.executable, "-m", "chaos", "--seed", str(seed), "--notebook", kind]
        command += [str(self.servers[0].folder), "--peers", *peers, "--more", *more]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@contextlib.contextmanager
def networks_if_allowed() -> Iterator[Networks | None]:
    """Namespaces for all servers and the notebook, or none where they cannot be made."""
    with contextlib.ExitStack() as stack:
        found: Networks | None = None
        try:
            found = stack.enter_context(Networks(len(SPANS) + 1))
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"without network namespaces, and so without partitions ({error})")
        yield found


def start(servers: Sequence[Server]) -> None:
    """All of them; the others join the first."""
    servers[0].start()
    servers[0].wait_ready()
    for server in servers[1:]:
        server.peers = [servers[0].address]
        server.start()
    for server in servers[1:]:
        server.wait_ready()


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=chaos.__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the servers compute")
    parser.add_argument("--notebook", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--peers", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--more", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.notebook:
        kind, folder = options.notebook
        if kind == "looks":
            notebooks.look(options.peers, folder, options.more)
        else:
            KINDS[kind](options.peers, folder, options.seed)
        return 0
    forkserver.install()
    with tempfile.TemporaryDirectory() as name, networks_if_allowed() as networks:
        place = Path(name)
        folder = tiny_model("llama", place)
        servers = [
            Server(number, folder, place, networks, options.device) for number in range(len(SPANS))
        ]
        with contextlib.ExitStack() as stack:
            for server in servers:
                stack.callback(server.kill)
            start(servers)
            run = Run(servers, networks, options.seed)
            say("warm-up")
            run.phase(options.seconds / 5)
            before = run.calm()
            say(f"calm: {before}")
            run.phase(options.seconds * 4 / 5)
            after = run.calm()
            say(f"calm: {after}")
    told = run.told
    for text, times in Counter(told.errors).items():
        say(f"{times} x {text}")
    grown = compare(run.steady, before, after)
    for text in [*told.unclear, *grown]:
        say(text)
    print(told.table())
    bad = told.counts["wrong"] or told.counts["lost"] or told.unclear or grown
    return 1 if bad or not told.counts["tokens"] else 0


if __name__ == "__main__":
    sys.exit(main())
