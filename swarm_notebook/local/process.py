"""One server of a swarm on this machine, as a child process.

The child is ``swarm-notebook serve`` in its own session, so that an interrupt of the notebook does
not reach it. Its life hangs on a pipe: stdin stays open as long as this process lives, and the
server leaves when it closes, which happens even when this process is killed. Standard output
carries JSON lines of facts (addresses first, ``"ready": true`` at last); everything else goes to
the log file.

Identity and port are kept over a restart, so that addresses given to others stay valid. The private
key behind the identity is on disk only while the network daemon starts and reads it; afterwards it
is held in memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

import psutil

from swarm_notebook.errors import ServerStartError
from swarm_notebook.local.folder import ServerFolder

logger: logging.Logger = logging.getLogger(__name__)

LOG_TAIL_LINES = 25  # more than a traceback through torch has, less than a screen
START_SECONDS = 180.0  # a start takes 10 to 30 s, of a large model from a slow disk some minutes
TERMINATE_SECONDS = 10.0
POLL_SECONDS = 0.05
ANY_PORT = "/ip4/127.0.0.1/tcp/0"
ANY_INTERFACE = "/ip4/0.0.0.0/tcp/0"
PORT = re.compile(r"/ip4/[\d.]+/tcp/(\d+)")


def server_environment(threads: int | None) -> dict[str, str]:
    """The environment variables of a server process."""
    environment = dict(os.environ)
    environment["PYTHONUNBUFFERED"] = "1"
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def as_words(**options: Any) -> list[str]:
    """Options of ``swarm-notebook serve`` by their names, as the command line has them.

    Those that are None, False or an empty list are left out.
    """
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False or value == []:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def start_server(
    command: Sequence[str], log: IO[str] | int, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a server in a session of its own, with pipes to its standard input and output.

    Args:
        command: ``swarm-notebook serve`` with ``--exit-with-stdin``, and whatever it runs in.
        log: takes its standard error; or `subprocess.PIPE`.
        environment: variables of the process; None: this one's.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
        start_new_session=True,
    )


class LocalServer:
    """A server process of this machine that holds blocks ``[start, end)`` of a model.

    Args:
        name: of the server in its swarm, and of its files in ``folder``.
        blocks: ``(start, end)``.
        chooses: whether it may hold others, as it chooses by its memory and what its swarm needs.
        folder: for its log; whoever made it removes it.
        model: where the server finds it.
        swarm_addresses: where others of the swarm listen; asked when it is restarted.
        listen: a multiaddr.
        key: the private key of an earlier process, to be the same peer.
        threads: CPU threads; None leaves it to torch.
        options: more of ``swarm-notebook serve``, see `as_words`.

    Attributes:
        log_path: the log; it is removed with the folder, unless the server failed.
        key: the private key behind the peer id, as soon as there is one.
    """

    name: str

    def __init__(
        self,
        name: str,
        blocks: tuple[int, int],
        model: str,
        *,
        chooses: bool = False,
        folder: ServerFolder,
        swarm_addresses: Callable[[], list[str]],
        listen: str = ANY_PORT,
        key: bytes | None = None,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        self.name, self._blocks, self._chooses, self.key = name, blocks, chooses, key
        self.log_path = folder.path / f"{name}.log"
        self._folder = folder
        self._identity = folder.path / f"{name}.key"
        self._asked_to_end = False
        self._options = [model, *as_words(threads=threads, **options)]
        self._environment = server_environment(threads)
        self._swarm_addresses = swarm_addresses
        self._process: subprocess.Popen[str] | None = None
        self._facts: dict[str, Any] = {}
        self._listen = listen

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks that it holds, or is to hold."""
        start, end = self._facts.get("blocks", self._blocks)
        return start, end

    @property
    def pid(self) -> int | None:
        """The server's process id; that of the last run if it has ended."""
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        if self._process is None or self._process.returncode is not None:
            return False
        # The process is looked at, not reaped: until `kill` its id belongs to nobody else.
        try:
            return psutil.Process(self._process.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:  # somebody else has waited for it
            return False

    @property
    def ready(self) -> bool:
        """Whether it has loaded its blocks and announced them."""
        return bool(self._facts.get("ready"))

    @property
    def weights(self) -> tuple[int, int]:
        """Bytes of its weights that it has read, and all of them; zeros before it begins."""
        return self._facts.get("weights_read", 0), self._facts.get("weights", 0)

    @property
    def peer_id(self) -> str | None:
        """Its peer id, as soon as it listens."""
        return self._facts.get("peer_id")

    @property
    def addresses(self) -> list[str]:
        """The multiaddrs where it listens; empty until it does."""
        return list(self._facts.get("maddrs", ()))

    def launch(self) -> None:
        """Start the process, which loads its code and then waits for `join`.

        Raises:
            ServerStartError: its log or its key cannot be written.
        """
        free = self._listen in (ANY_PORT, ANY_INTERFACE)
        if free and self.addresses and (known := PORT.match(self.addresses[0])):
            self._listen = self._listen.removesuffix("0") + known[1]
        command = [sys.executable, "-m", "swarm_notebook.cli", "serve", *self._options]
        command += ["--name", self.name, "--exit-with-stdin"]
        if not self._chooses:
            command += ["--blocks", "{}:{}".format(*self._blocks)]
        command += ["--identity", str(self._identity), "--host-maddrs", self._listen]
        command += ["--initial-peers", "-", "--scratch", str(self._folder.path)]
        self._facts, self._asked_to_end = {}, False
        try:
            self._folder.make()
            self._write_key()
            log = self.log_path.open("a", encoding="utf-8")
        except OSError as error:
            raise self.start_error(f"could not be started ({error})") from None
        self._process = start_server(command, log, self._environment)
        threading.Thread(
            target=self._read, args=(self._process.stdout, log, self._facts), daemon=True
        ).start()

    def join(self, peers: Sequence[str]) -> None:
        """Tell the process which swarm to join; no peers begin a new one."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended: `check` will say so
                print(*peers, file=self._process.stdin, flush=True)

    def wait_ready(self, timeout: float) -> None:
        """Return when it is ready.

        Raises:
            ServerStartError: it ended, or `timeout` seconds were not enough.
        """
        deadline = time.monotonic() + timeout
        while not self.ready:
            self.check()
            if time.monotonic() > deadline:
                raise self.start_error(f"took more than {timeout:.0f} s")
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise ServerStartError if the process ended before it was ready."""
        if not self.ready and not self.running:
            self.kill()
            code = self._process.returncode if self._process is not None else None
            raise self.start_error(f"ended with exit code {code}")

    def start_error(self, what: str) -> ServerStartError:
        """The error for a start that failed, with the end of the log, which is kept."""
        start, end = self.blocks
        self._folder.keep(self.log_path)
        return ServerStartError(
            f"server {self.name} (blocks {start}:{end}) {what} before it was ready."
            f"{self._folder.full()} The end of its log, {self.log_path}:\n"
            f"{self.log_tail() or '(empty)'}"
        )

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of the log."""
        text = self.log_path.read_text("utf-8", "replace") if self.log_path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def kill(self) -> None:
        """End it at once, as a power cut would: nothing is announced, nothing is finished."""
        if self._process is None or self._process.returncode is not None:
            return
        failed = not self.running and not self._asked_to_end
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the server and its network daemon
        code = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if failed and code > 0:  # below 0 it was killed by a signal: its log does not say why
            self._folder.keep(self.log_path)
            if self.ready:
                logger.warning(
                    "server %s ended by itself with exit code %d; its log is kept: %s",
                    self.name,
                    code,
                    self.log_path,
                )

    def terminate(self, timeout: float = TERMINATE_SECONDS) -> None:
        """Let it leave the swarm in good order; after `timeout` seconds it is killed."""
        self.request_stop()
        deadline = time.monotonic() + timeout
        while self.running and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self.kill()

    def request_stop(self) -> None:
        """Ask it to leave the swarm; does not wait."""
        if self._process is not None and self.running:
            self._asked_to_end = True
            os.kill(self._process.pid, signal.SIGTERM)

    def restart(self, timeout: float = START_SECONDS) -> None:
        """Start it again, under the same peer id and address, and wait until it is ready."""
        self.terminate()
        self.launch()
        self.join(self._swarm_addresses())
        self.wait_ready(timeout)

    def _read(self, output: IO[str], log: IO[str], facts: dict[str, Any]) -> None:
        """Thread: file the facts that the server prints, and log the rest."""
        with output, log:
            for line in output:
                if not line.startswith("{"):
                    log.write(line)
                    log.flush()
                    continue
                with contextlib.suppress(json.JSONDecodeError):
                    told = json.loads(line)
                    if "peer_id" in told:
                        self._take_key()
                    facts.update(told)

    def _write_key(self) -> None:
        """Let the network daemon find the key of an earlier process; it makes one otherwise."""
        self._identity.unlink(missing_ok=True)
        if self.key is not None:
            made = os.open(self._identity, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
            with os.fdopen(made, "wb") as file:
                file.write(self.key)

    def _take_key(self) -> None:
        """The network daemon has read the key: nobody else is to find it on disk."""
        with contextlib.suppress(FileNotFoundError):
            self.key = self._identity.read_bytes()
            self._identity.unlink()

    def __repr__(self) -> str:
        start, end = self.blocks
        state = "ready" if self.ready and self.running else "running" if self.running else "ended"
        return f"<LocalServer {self.name} blocks {start}:{end} {state}>"
