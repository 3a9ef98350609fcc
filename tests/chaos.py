"""Seeded faults while a notebook generates and trains (``make chaos``).

    python tests/chaos.py [--seconds 600] [--seed 0]

A swarm of a tiny Llama, every block on two servers, all real processes; in network namespaces where
root may make them. A notebook process generates texts (greedy, compared token by token) and trains
a LoRA adapter (loss and gradients of each step), both compared with the local model, all the time.
One server at a time is disturbed, so that the other always has its blocks; or the notebook is.

A fault costs a pause: the longest time without a token or a step from its beginning to
`AFTER_SECONDS` after its end, less the time that the notebook itself slept. A table at the end says
what happened.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from soak import TOLERANCE, local_model, say
from support.networks import Networks
from support.tiny import tiny_model

from swarm_notebook.errors import SwarmError
from swarm_notebook.net.identity import Identity

SPANS = [(0, 2), (2, 5), (0, 2), (2, 5)]
OTHER_SPANS = {(0, 2): (0, 3), (0, 3): (0, 2), (2, 5): (1, 5), (1, 5): (2, 5)}
NOTEBOOK = len(SPANS)  # the number of its namespace
NEW_TOKENS = 24
AFTER_SECONDS, START_SECONDS = 4.0, 120.0
# The swarm is let alone so long after a fault, and between two.
CALM_SECONDS = (0.5, 2.0)
# A server whose clock is off, by as much as is allowed and a little less.
CLOCK_SECONDS = (-50, 50)
PROGRAM = """
import sys, time
real, ahead = time.time, float(sys.argv.pop(1))
time.time = lambda: real() + ahead
from swarm_notebook.cli import main
main()
"""


class Server:
    """One server process with an address and an identity that last."""

    def __init__(self, number: int, folder: Path, place: Path, networks: Networks | None):
        self.number, self.blocks, self.folder, self.place = number, SPANS[number], folder, place
        self.peers: list[str] = []
        self.prefix = networks.prefix(number) if networks else ()
        host = networks.address(number) if networks else "127.0.0.1"
        self.listen = f"/ip4/{host}/tcp/{_free_port()}"
        self.key = place / f"{number}.key"
        if not self.key.exists():
            Identity.new().write(self.key)
        identity = Identity.read(self.key)
        self.address = f"{self.listen}/p2p/{identity.peer_id}"
        self.process: subprocess.Popen[str] | None = None

    def launch(self, ahead: int = 0) -> subprocess.Popen[str]:
        start, end = self.blocks
        command = [*self.prefix, sys.executable, "-c", PROGRAM, str(ahead), "serve"]
        command += [str(self.folder), "--blocks", f"{start}:{end}", "--threads", "1"]
        command += ["--identity", str(self.key), "--host-maddrs", self.listen]
        command += ["--name", f"server-{self.number}", "--exit-with-stdin"]
        if self.peers:
            command += ["--initial-peers", *self.peers]
        with (self.place / f"{self.number}.log").open("a") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def start(self, ahead: int = 0) -> None:
        self.process = self.launch(ahead)

    def wait_ready(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if json.loads(line).get("ready"):
                return
        raise RuntimeError(f"server {self.number} ended: {self.log_tail()}")

    def log_tail(self) -> str:
        return (self.place / f"{self.number}.log").read_text()[-2000:]

    def signal(self, number: int) -> None:
        """To the server and its daemon, which are one group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def daemons(self) -> list[psutil.Process]:
        assert self.process is not None
        found = psutil.Process(self.process.pid).children(recursive=True)
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


@dataclass
class Told:
    """What the notebook has told: beats by kind of work, and what went wrong."""

    beats: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)

    def read(self, lines: Any) -> None:
        """Thread: until the notebook ends."""
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                self._take(json.loads(line))

    def _take(self, fact: dict[str, Any]) -> None:
        if "beat" in fact:
            self.beats[fact["beat"]].append(fact["at"])
        if "error" in fact:
            self.errors.append(fact["error"])
            if not fact["clear"]:
                self.unclear.append(fact["error"])
        self.counts.update(fact.get("counts", {}))

    def pause(self, began: float, ended: float, slept: float) -> float:
        """The longest time without a beat around a fault, in seconds."""
        longest = 0.0
        for beats in self.beats.values():
            times = [*beats, max(ended, time.monotonic())]
            for before, after in itertools.pairwise(times):
                if after > began and before < ended:
                    longest = max(longest, after - before)
        return max(longest - slept, 0.0)


class Chaos:
    """Servers, a notebook, and faults."""

    def __init__(
        self, servers: Sequence[Server], notebook: Any, networks: Networks | None, seed: int
    ):
        self.servers, self.notebook, self.networks = servers, notebook, networks
        self.told, self.dice = Told(), random.Random(seed)
        self.pauses: dict[str, list[float]] = defaultdict(list)
        threading.Thread(target=self.told.read, args=(notebook.stdout,), daemon=True).start()

    @property
    def kinds(self) -> dict[Callable[[Server], float | None], int]:
        """The faults and how often each comes; those that start a server take seconds."""
        found: dict[Callable[[Server], float | None], int] = {
            self.stop: 6,
            self.stop_daemon: 6,
            self.memory: 4,
            self.disk: 4,
            self.sleep: 4,
            self.kill: 2,
            self.leave: 1,
            self.another_span: 1,
            self.clock: 1,
            self.twin: 1,
            self.bootstrap_gone: 1,
        }
        if self.networks is not None:
            found[self.partition] = 8
            if self.networks.shapes:
                found |= {self.loss: 6, self.slow: 6}
        return found

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        kinds = self.kinds
        while time.monotonic() < end and self.notebook.poll() is None:
            time.sleep(self.dice.uniform(*CALM_SECONDS))
            (fault,) = self.dice.choices(list(kinds), weights=list(kinds.values()))
            server = self.dice.choice(self.servers)
            began = time.monotonic()
            slept = fault(server) or 0.0
            ended = time.monotonic() + AFTER_SECONDS
            time.sleep(AFTER_SECONDS)
            pause = self.told.pause(began, ended, slept)
            self.pauses[fault.__name__].append(pause)
            say(f"{fault.__name__} of server {server.number}: a pause of {pause:.1f} s")

    def stop(self, server: Server) -> None:
        """A machine that stands still: the connections stay, nobody answers."""
        server.signal(signal.SIGSTOP)
        time.sleep(self.dice.uniform(1, 8))
        server.signal(signal.SIGCONT)

    def stop_daemon(self, server: Server) -> None:
        for daemon in server.daemons():
            daemon.suspend()
        time.sleep(self.dice.uniform(1, 8))
        for daemon in server.daemons():
            daemon.resume()

    def kill(self, server: Server) -> None:
        server.kill()
        time.sleep(self.dice.uniform(0, 3))
        self._again(server)

    def leave(self, server: Server) -> None:
        assert server.process is not None
        server.process.terminate()
        server.process.wait()
        self._again(server)

    def another_span(self, server: Server) -> None:
        server.kill()
        server.blocks = OTHER_SPANS[server.blocks]
        self._again(server)

    def clock(self, server: Server) -> None:
        server.kill()
        self._again(server, self.dice.choice(CLOCK_SECONDS))

    def twin(self, server: Server) -> None:
        """A second server with the same identity, at another address."""
        twin = Server(server.number, server.folder, server.place, None)
        twin.prefix, twin.key, twin.peers = server.prefix, server.key, [server.address]
        twin.listen, twin.blocks = server.listen.rpartition("/")[0] + "/0", server.blocks
        twin.start()
        assert twin.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            twin.process.wait(15)
        twin.kill()

    def bootstrap_gone(self, _server: Server) -> None:
        """The one whose address all others were given."""
        self.kill(self.servers[0])

    def memory(self, server: Server) -> None:
        """No more memory for a while: what is asked for beyond what it has fails."""
        assert server.process is not None
        with self._limited(
            server, resource.RLIMIT_AS, psutil.Process(server.process.pid).memory_info().vms
        ):
            time.sleep(self.dice.uniform(1, 4))

    def disk(self, server: Server) -> None:
        """Nothing can be written for a while."""
        with self._limited(server, resource.RLIMIT_FSIZE, 0):
            time.sleep(self.dice.uniform(1, 4))

    def sleep(self, _server: Server) -> float:
        """The lid of the notebook is closed."""
        seconds = self.dice.uniform(1, 15)
        os.killpg(self.notebook.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.killpg(self.notebook.pid, signal.SIGCONT)
        return seconds

    def partition(self, server: Server) -> None:
        assert self.networks is not None
        with self.networks.cut(server.number):
            time.sleep(self.dice.uniform(1, 8))

    def loss(self, server: Server) -> None:
        assert self.networks is not None
        with self.networks.shaped(server.number, "loss", f"{self.dice.randint(2, 30)}%"):
            time.sleep(self.dice.uniform(1, 8))

    def slow(self, server: Server) -> None:
        assert self.networks is not None
        with self.networks.shaped(server.number, "delay", "300ms", "100ms", "rate", "2mbit"):
            time.sleep(self.dice.uniform(1, 8))

    @contextlib.contextmanager
    def _limited(self, server: Server, what: int, limit: int) -> Iterator[None]:
        assert server.process is not None
        before = resource.prlimit(server.process.pid, what)
        resource.prlimit(server.process.pid, what, (limit, before[1]))
        try:
            yield
        finally:
            if server.process.poll() is None:
                resource.prlimit(server.process.pid, what, before)
            else:
                self._again(server)

    def _again(self, server: Server, ahead: int = 0) -> None:
        server.kill()
        server.peers = [other.address for other in self.servers if other is not server]
        server.start(ahead)
        server.wait_ready()

    def table(self) -> str:
        """What happened, and what it cost."""
        rows = ["fault              times   median    worst"]
        for kind, pauses in sorted(self.pauses.items()):
            median = statistics.median(pauses)
            rows.append(f"{kind:<17} {len(pauses):>6} {median:>6.1f} s {max(pauses):>6.1f} s")
        every = [pause for pauses in self.pauses.values() for pause in pauses] or [0.0]
        rows.append(
            f"{'all':<17} {len(every):>6} {statistics.median(every):>6.1f} s {max(every):>6.1f} s"
        )
        counts = self.told.counts
        rows.append(
            f"{counts['tokens']} tokens, {counts['wrong']} wrong; {counts['steps']} steps, "
            f"{counts['lost']} lost; {len(self.told.errors)} errors, {len(self.told.unclear)} of "
            "them without a clear text"
        )
        return "\n".join(rows)


def notebook_process(peers: Sequence[str], folder: str, seed: int) -> None:
    """Generates and trains for ever, telling of each token and step on standard output."""
    import swarm_notebook as sn

    swarm = sn.connect(peers, model=folder)
    works = (Generation(swarm, folder, seed), Training(swarm, folder, seed))
    threads = [threading.Thread(target=_keep, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def tell(**fact: Any) -> None:
    sys.stdout.write(json.dumps(fact) + "\n")
    sys.stdout.flush()


def _keep(work: Generation | Training) -> None:
    while True:
        try:
            work.once()
        except Exception as error:
            clear = isinstance(error, SwarmError) and len(str(error)) > 20
            tell(error=f"{type(error).__name__}: {error}"[:500], clear=clear, counts=work.failed)


class Generation:
    """Greedy texts, each compared with the local model's."""

    def __init__(self, swarm: Any, folder: str, seed: int):
        self.failed = {"failed texts": 1}
        self.remote, self.local = swarm.model, local_model(folder)
        self.noise = torch.Generator().manual_seed(seed)

    def once(self) -> None:
        ids = torch.randint(3, 128, (1, 12), generator=self.noise)
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        options |= {"attention_mask": torch.ones_like(ids)}
        ours = self.remote.generate(ids, stopping_criteria=[self._beat], **options)[0].tolist()
        theirs = self.local.generate(ids, **options)[0].tolist()
        wrong = sum(mine != other for mine, other in zip(ours, theirs, strict=True))
        tell(counts={"tokens": NEW_TOKENS, "wrong": wrong})

    @staticmethod
    def _beat(input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        tell(beat="token", at=time.monotonic())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Training:
    """Steps of one LoRA adapter here and there; they are compared, and lost if they fail."""

    def __init__(self, swarm: Any, folder: str, seed: int):
        import copy

        import peft

        self.failed = {"lost": 1, "steps": 1}
        self.noise = torch.Generator().manual_seed(seed)
        self.models = []
        for model in (copy.deepcopy(swarm.model), local_model(folder)):
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
            self.models.append(peft.get_peft_model(model, config))
        self.optimizer = torch.optim.SGD(self._trained()[1], lr=0.1)

    def once(self) -> None:
        ids = torch.randint(3, 128, (2, 16), generator=self.noise)
        losses = []
        for model in self.models:
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
        lost = int(abs(losses[0] - losses[1]) > TOLERANCE or not self._same_gradients())
        self.optimizer.step()
        # Each step begins with the same weights here and there: rounding would grow otherwise.
        ours, theirs = self._trained()
        with torch.no_grad():
            for mine, other in zip(ours, theirs, strict=True):
                mine.copy_(other)
        tell(beat="step", at=time.monotonic(), counts={"steps": 1, "lost": lost})

    def _same_gradients(self) -> bool:
        ours, theirs = self._trained()
        return all(
            (mine.grad - other.grad).abs().max() <= TOLERANCE * (other.grad.abs().max() + TOLERANCE)
            for mine, other in zip(ours, theirs, strict=True)
        )

    def _trained(self) -> tuple[list[Any], list[Any]]:
        """The trained parameters of the remote and of the local model."""
        ours, theirs = (
            [each for each in model.parameters() if each.requires_grad] for model in self.models
        )
        return ours, theirs


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--notebook", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--peers", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if options.notebook:
        notebook_process(options.peers, options.notebook, options.seed)
    with tempfile.TemporaryDirectory() as name, networks_if_allowed() as networks:
        place = Path(name)
        folder = tiny_model("llama", place)
        servers = [Server(number, folder, place, networks) for number in range(len(SPANS))]
        with contextlib.ExitStack() as stack:
            for server in servers:
                stack.callback(server.kill)
                server.start()
                server.wait_ready() if server is servers[0] else None
                for other in servers:
                    other.peers = [servers[0].address]
            for server in servers[1:]:
                server.wait_ready()
            command = [sys.executable, __file__, "--notebook", str(folder)]
            command += ["--seed", str(options.seed), "--peers", servers[0].address]
            prefix = networks.prefix(NOTEBOOK) if networks else ()
            notebook = subprocess.Popen(
                [*prefix, *command], stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            stack.callback(notebook.wait)
            stack.callback(os.killpg, notebook.pid, signal.SIGKILL)
            chaos = Chaos(servers, notebook, networks, options.seed)
            deadline = time.monotonic() + START_SECONDS
            while len(chaos.told.beats) < 2 and time.monotonic() < deadline:
                time.sleep(0.2)
            chaos.run(options.seconds)
            ended = notebook.poll() is not None
    for text in Counter(chaos.told.errors).items():
        say(f"{text[1]} x {text[0]}")
    print(chaos.table())
    counts = chaos.told.counts
    bad = ended or counts["wrong"] or counts["lost"] or chaos.told.unclear
    return 1 if bad or not counts["tokens"] else 0


if __name__ == "__main__":
    sys.exit(main())
