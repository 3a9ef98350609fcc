"""One server for each GPU of a machine: processes that form one swarm, or join one, together.

Each is ``swarm-notebook serve`` on one device, with a peer id and blocks of its own, which it
chooses as every server does that joins a swarm. They are started at once, as most of a start is
importing, and join one after the other: whoever chooses is to see what those before it have chosen.
Its GPU is the only one that its process sees, so nothing in it can take another by mistake.

What a server prints is passed on with its device. One that ends by itself leaves the others at
work; a signal ends all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from swarm_notebook.local.process import as_words, server_environment, start_server
from swarm_notebook.net.membership.authority import Authority

# A server answers what is in flight before it leaves, for which it gives itself 30 s.
LEAVE_SECONDS = 45.0
PORT = re.compile(r"/(tcp|udp)/([1-9]\d*)")

_Event = tuple["_Server | None", str, Any]


class _Server:
    """One server's process; what it says and its end go into a queue."""

    def __init__(self, device: str, command: Sequence[str], events: SimpleQueue[_Event]):
        self.device, self.facts = device, dict[str, Any]()
        self.joined = self.settled = self.over = False
        self._events = events
        # In a session of its own: a terminal's Ctrl-C is for the one that tells them all.
        self._process = start_server(command, subprocess.PIPE, environment(device))
        for read in (self._read_facts, self._read_log):
            threading.Thread(target=read, daemon=True).start()

    def join(self, peers: Sequence[str]) -> None:
        """Tell it which swarm to join; no peers begin a new one."""
        self.joined = True
        with contextlib.suppress(BrokenPipeError):  # it has ended, and is heard of
            print(*peers, file=self._process.stdin, flush=True)

    def tell(self, number: signal.Signals) -> None:
        if not self.over:
            with contextlib.suppress(ProcessLookupError):
                # Its network daemon is a process of its own.
                kill = os.killpg if number == signal.SIGKILL else os.kill
                kill(self._process.pid, number)

    def _read_facts(self) -> None:
        output: Any = self._process.stdout
        for line in output:
            try:
                self._events.put((self, "told", json.loads(line)))
            except json.JSONDecodeError:
                say(self.device, line)
        # It has ended. If it was killed, its network daemon is still there.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._events.put((self, "ended", self._process.wait()))

    def _read_log(self) -> None:
        log: Any = self._process.stderr
        for line in log:
            say(self.device, line)


class Several:
    """Servers on some devices, until they are told to leave.

    Args:
        devices: such as ``"cuda:1"``, one for each.
        options: of ``swarm-notebook serve`` by their names, none of ``--device`` and ``--blocks``.
    """

    def __init__(self, devices: Sequence[str], options: Mapping[str, Any]):
        self._given = list(options.get("initial_peers") or ())
        self._swarm: Path | None = options.get("swarm")
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._failed = self._ready = False
        self._deadline: float | None = None  # of those that were told to leave
        self._servers = [
            _Server(device, command(device, index, options), self._events)
            for index, device in enumerate(devices)
        ]

    def run(self) -> int:
        """Serve; the exit code, which is 0 if all have left because they were told to."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        self._join_next()
        while not all(server.over for server in self._servers):
            try:
                server, what, said = self._events.get(timeout=1.0)
            except Empty:
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._tell_all(signal.SIGKILL)
                continue
            if server is None:
                # Who asks a second time does not want to wait.
                self._tell_all(signal.SIGTERM if self._deadline is None else signal.SIGKILL)
                self._deadline = self._deadline or time.monotonic() + LEAVE_SECONDS
            elif what == "told":
                self._hear(server, said)
            else:
                self._count_out(server, said)
            if self._deadline is None:
                self._join_next()
        return int(self._failed)

    def stop(self) -> None:
        """Let all leave; may be called from any thread, and from a signal."""
        self._events.put((None, "stop", None))

    def _hear(self, server: _Server, said: dict[str, Any]) -> None:
        server.facts |= said
        server.settled = server.settled or "blocks" in said
        if "weights" not in said:  # how much was read: the log says it
            _tell(device=server.device, **said)
        if not self._ready and all(each.facts.get("ready") for each in self._servers):
            self._ready = True
            if self._swarm is not None:
                _tell(invitation=str(Authority(self._swarm).invite()))

    def _count_out(self, server: _Server, code: int) -> None:
        server.over = server.settled = True
        if self._deadline is None or code != 0:
            self._failed = True
            left = sum(not each.over for each in self._servers)
            rest = f"{left} of {len(self._servers)} go on" if left else "none is left"
            say(server.device, f"this server has ended with exit code {code}: {rest}")

    def _tell_all(self, number: signal.Signals) -> None:
        for server in self._servers:
            server.tell(number)

    def _join_next(self) -> None:
        """Let the next one join, if all before it have chosen their blocks."""
        for server in self._servers:
            if not server.joined:
                here = [one.facts.get("maddrs", ()) for one in self._servers if not one.over]
                server.join([*self._given, *itertools.chain(*here)])
            if not server.settled:
                return


def _tell(**facts: Any) -> None:
    """One JSON line for the program that started these servers."""
    print(json.dumps(facts), flush=True)


def command(device: str, index: int, options: Mapping[str, Any]) -> list[str]:
    """How the server on a device is started; it reads from standard input whom to join."""
    numbered = dict(options)
    for name in ("name", "identity"):
        if numbered.get(name) is not None and index > 0:
            numbered[name] = f"{numbered[name]}-{index}"
    numbered["host_maddrs"] = [
        PORT.sub(lambda found: f"/{found[1]}/{int(found[2]) + index}", address)
        for address in options.get("host_maddrs") or ()
    ]
    numbered |= {"initial_peers": ["-"], "exit_with_stdin": True, "chosen": True}
    numbered["private"] = options.get("swarm") is not None
    numbered["device"] = "cuda" if device.startswith("cuda") else device
    model = numbered.pop("model", None)
    served = [str(model)] if model else []
    return [sys.executable, "-m", "swarm_notebook.cli", "serve", *served, *as_words(**numbered)]


def environment(device: str) -> dict[str, str]:
    """The variables of a process that is to see no other GPU than its own."""
    found = server_environment(None)
    kind, _, number = device.partition(":")
    if kind == "cuda":
        # Where some are hidden from this process, numbers count those that are not.
        visible = [part for part in found.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        found["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if visible else number
    return found


def say(device: str, line: str) -> None:
    """A line of a server's, or about it, for people."""
    # In one piece: several threads do.
    sys.stderr.write(f"[{device}] {line.rstrip()}\n")
    sys.stderr.flush()
