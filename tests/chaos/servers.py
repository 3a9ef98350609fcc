"""The servers: real processes, each with an address and an identity that last."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
from support.networks import Networks

from swarm_notebook.local.process import start_server
from swarm_notebook.net.identity import Identity

# Three pairs; the first ones of the pairs are those that are restarted.
SPANS = [(0, 2), (2, 4), (4, 5)] * 2
PAIRS = len(SPANS) // 2
STEADY = range(PAIRS, len(SPANS))
# As `swarm-notebook serve`, with a clock that is ahead.
PROGRAM = """
import sys, time
real, ahead = time.time, float(sys.argv.pop(1))
time.time = lambda: real() + ahead
from swarm_notebook.cli import main
main()
"""


class Server:
    """One of the servers, which may be started again and again."""

    def __init__(
        self,
        number: int,
        folder: Path,
        place: Path,
        networks: Networks | None = None,
        device: str = "cpu",
    ):
        self.number, self.blocks, self.folder, self.place = number, SPANS[number], folder, place
        self.device, self.peers, self.restarts = device, list[str](), 0
        self.ahead = 0  # seconds by which its clock is
        self.prefix = networks.prefix(number) if networks else ()
        host = networks.address(number) if networks else "127.0.0.1"
        self.listen = f"/ip4/{host}/tcp/{_free_port()}"
        self.key = place / f"{number}.key"
        if not self.key.exists():
            Identity.new().write(self.key)
        self.peer_id = Identity.read(self.key).peer_id.to_base58()
        self.process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"{self.listen}/p2p/{self.peer_id}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, ahead: int = 0) -> None:
        """Start the process, with a clock that is so many seconds ahead."""
        self.ahead = ahead
        program = ["-c", PROGRAM, str(ahead)] if ahead else ["-m", "swarm_notebook.cli"]
        start, end = self.blocks
        command = [*self.prefix, sys.executable, *program, "serve"]
        command += [str(self.folder), "--blocks", f"{start}:{end}", "--threads", "1"]
        command += ["--identity", str(self.key), "--host-maddrs", self.listen]
        command += ["--name", f"server-{self.number}", "--device", self.device]
        command += ["--exit-with-stdin"]
        if self.peers:
            command += ["--initial-peers", *self.peers]
        with (self.place / f"{self.number}.log").open("a") as log:
            self.process = start_server(command, log)

    def wait_ready(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if json.loads(line).get("ready"):
                return
        log = (self.place / f"{self.number}.log").read_text()
        raise RuntimeError(f"server {self.number} ended: {log[-2000:]}")

    def said(self) -> str:
        """Whether it runs, and the end of its log."""
        log = (self.place / f"{self.number}.log").read_text()
        return f"{'it runs' if self.running else 'it has ended'}; {log[-2000:]}"

    def again(self, ahead: int = 0) -> None:
        """End it, if it lives, and start it anew."""
        self.kill()
        self.restarts += 1
        self.start(ahead)
        self.wait_ready()

    def signal(self, number: int) -> None:
        """To the server and its daemon, which are one group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def daemons(self) -> list[psutil.Process]:
        found = psutil.Process(self.pid).children(recursive=True)
        return [child for child in found if "p2pd" in child.name()]

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
