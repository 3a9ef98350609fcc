"""A swarm that is disturbed on purpose, and what to compare its outputs with.

`Scene` holds servers of the tiny Llama, one connected notebook for all of a module's tests (so
that every test also shows that the last one's disturbance was survived) and the local model.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from support.hosting import HostedSwarm
from support.pairs import TOLERANCE, Connected, local_model
from support.patience import PATIENCE, wait_until
from support.processes import lasting_swarms
from transformers import StoppingCriteria

import swarm_notebook as sn
from swarm_notebook.client.session.batch import BatchSession
from swarm_notebook.local.process import ANY_PORT, LocalServer
from swarm_notebook.swarm import Swarm

NEW_TOKENS = 14
RESTART_SECONDS = PATIENCE


class AtToken(StoppingCriteria):
    """Does something after the given tokens of a generation; stops nothing."""

    def __init__(self, actions: dict[int, Callable[[], None]]):
        self.actions, self.count = actions, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.count += 1
        if self.count in self.actions:
            self.actions[self.count]()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@dataclass
class Scene(Connected):
    local: Any  # a `LocalSwarm` or a `HostedSwarm`
    swarm: Swarm
    reference: Any
    sessions: list[BatchSession] = field(default_factory=list)

    def server(self, peer: str) -> LocalServer:
        return next(server for server in self.local.servers if server.peer_id == peer)

    def next_server(self) -> LocalServer:
        """The first server of the route that a new session takes."""
        return self.server(self.swarm.route().hops[0].peer_id)

    def in_use(self) -> LocalServer:
        """The last server in the chain of the latest session."""
        return self.server(self.sessions[-1].hops[-1].segment.peer)

    def heal(self) -> None:
        """Start all servers again that are gone, where they were.

        All of them: the double of the one that a test kills must be there by then.
        """
        wait_until(self._all_used, "the notebook uses all servers again")

    def _all_used(self) -> bool:
        # One whose daemon was killed may end only now.
        self._restart([server for server in self.local.servers if not server.running])
        self.swarm.status()
        used = {span.peer for span in self.swarm.connection.directory.usable()}
        return used >= {server.peer_id for server in self.local.servers}

    def _restart(self, gone: list[LocalServer]) -> None:
        for server in gone:
            server.launch()
            server.join(self.local.initial_peers)
        for server in self.local.servers:
            server.wait_ready(RESTART_SECONDS)

    def begin(self) -> Scene:
        """As if nothing had happened yet."""
        connection = self.swarm.connection
        gone = [server for server in self.local.servers if not server.running]
        for server in gone:
            # Elsewhere: a port that has refused a connection is dialled again after five seconds.
            server._listen, server._facts = ANY_PORT, {}
        self._restart(gone)
        for server in gone:
            connection.run(connection.directory.node.meet(server.peer_id, server.addresses))
        self.forgive()
        self.heal()
        self.sessions.clear()
        return self

    def forgive(self) -> None:
        """Avoid no server for what it did, and keep no two apart."""
        for server in self.local.servers:
            self.swarm.connection.directory.health.forget(server.peer_id)

    def same(self, ours: Any, theirs: Any) -> None:
        """Tokens, and logits where they were asked for."""
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        for mine, local in zip(ours.logits or (), theirs.logits or (), strict=True):
            torch.testing.assert_close(mine, local, atol=TOLERANCE, rtol=0)


def generate(model: Any, inputs: Any, **options: Any) -> Any:
    """`NEW_TOKENS` tokens with their logits."""
    if not isinstance(inputs, dict):
        # Else transformers guesses one, from padding tokens that a random model may generate.
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    shown = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **{**fixed, **shown, **options})


@contextmanager
def scene(folder: Path, spans: Any, *, hosted: bool = False, **options: Any) -> Iterator[Scene]:
    """Servers of a tiny model, connected; `hosted` in this process if none is to be killed."""
    with (
        _swarm(folder, spans, hosted, options) as local,
        sn.connect(local.initial_peers, model=folder) as swarm,
    ):
        made = Scene(local, swarm, local_model(folder))
        connection: Any = swarm.connection
        new_session = connection.session

        def session(*arguments: Any) -> BatchSession:
            made.sessions.append(new_session(*arguments))
            return made.sessions[-1]

        connection.session = session
        yield made


@contextmanager
def _swarm(folder: Path, spans: Any, hosted: bool, options: dict[str, Any]) -> Iterator[Any]:
    if hosted:
        with HostedSwarm(folder, spans, **options) as swarm:
            yield swarm
        return
    with sn.LocalSwarm(folder, spans, threads=1, **options) as local:
        lasting_swarms.append(local)
        try:
            yield local
        finally:
            lasting_swarms.remove(local)


def kill_process(server: LocalServer) -> None:
    """SIGKILL for the server's process alone; its network daemon has to notice by itself."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)


def kill_daemon(server: LocalServer) -> None:
    """SIGKILL for the network daemon alone."""
    for child in psutil.Process(server.pid).children():
        if "p2pd" in child.name():
            child.kill()


def stop_then_kill(server: LocalServer, seconds: float = 0.4) -> None:
    """Let the server hang, and die with whatever it has been asked in the meantime."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    threading.Timer(seconds, server.kill).start()
