"""Servers inside of this process: they work side by side, and leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hivemind.p2p import P2P, P2PDaemonError
from support.patience import PATIENCE
from support.raw_wire import RawSession, request
from torch.utils._python_dispatch import TorchDispatchMode

import swarm_notebook as sn
from swarm_notebook.errors import ModelNotFound
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.message import PackedTensor
from swarm_notebook.net.wire.opening import open_stream
from swarm_notebook.server import app
from swarm_notebook.server.app import Server
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.options import ServeOptions
from swarm_notebook.swarm import Swarm

HIDDEN, NAME = 48, "tiny-llama"


class Loop:
    """An asyncio loop in a thread, and a folder for the sockets of the daemons that it starts."""

    def __init__(self, sockets: Path):
        self.sockets = sockets
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers")
        self._thread.start()
        self._before = self._left()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def _left(self) -> dict[str, set[Any]]:
        return {
            "threads": {
                thread.name
                for thread in threading.enumerate()
                if thread.name.startswith(("compute", "codec"))
            },
            "processes": {
                child.pid
                for child in psutil.Process().children(recursive=True)
                if child.status() != psutil.STATUS_ZOMBIE
            },
            "files": set(self.sockets.iterdir()),
            "tasks": {task.get_name() for task in asyncio.all_tasks(self._loop)},
        }

    def assert_clean(self) -> None:
        """Nothing more is there than in the beginning, at the latest in a while."""
        deadline = time.monotonic() + PATIENCE
        while (left := self._left()) != self._before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == self._before

    def close(self) -> None:
        for task in asyncio.all_tasks(self._loop):  # of notebooks' DHT nodes, which sleep
            self._loop.call_soon_threadsafe(task.cancel)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    # A socket's path may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="sn") as folder:
        monkeypatch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{folder}/")
        made = Loop(Path(folder))
        yield made
        made.close()


def options(model: Path, **changes: Any) -> ServeOptions:
    return ServeOptions(model, **{"threads": None, **changes})


@contextlib.contextmanager
def started(loop: Loop, *choices: ServeOptions) -> Iterator[list[Server]]:
    servers = [Server(choice) for choice in choices]
    try:
        for server in servers:
            loop.run(server.start())
        yield servers
    finally:
        for server in reversed(servers):
            loop.run(server.stop())


def test_two_servers_in_one_loop_serve_a_notebook(loop: Loop, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 14)[None]
    local = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    wanted = local.generate(ids, max_new_tokens=12, do_sample=False)
    with started(loop, options(tiny_llama, blocks=(0, 2))) as (first,):
        peers = first.facts["maddrs"]
        second = options(tiny_llama, blocks=(2, 5), initial_peers=peers)
        with started(loop, second), connected(peers, tiny_llama) as swarm:
            got = swarm.model.generate(ids, max_new_tokens=12, do_sample=False)
            assert got.tolist() == wanted.tolist()
            assert [hop.blocks for hop in swarm.route().hops] == ["0:2", "2:5"]
    loop.assert_clean()


@contextlib.contextmanager
def connected(peers: list[str], model: Path) -> Iterator[Swarm]:
    swarm = sn.connect(peers, model=model)
    try:
        yield swarm
    finally:
        swarm.disconnect()


def test_how_steps_run_is_announced_when_it_changes(
    loop: Loop, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "EXPIRE_SECONDS", 0.1)
    with (
        started(loop, options(tiny_llama)) as (server,),
        connected(server.facts["maddrs"], tiny_llama) as swarm,
    ):

        def engine() -> str | None:
            swarm.connection.refresh()
            return swarm.status().servers[0].engine

        assert (engine() or "").startswith("plain: ")
        # As if compiled blocks had taken over; announcing is due in a minute only.
        monkeypatch.setattr(Batching, "engine", "compiled")
        deadline = time.monotonic() + PATIENCE
        while engine() != "compiled" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert engine() == "compiled"


def test_stopping_twice_and_before_the_start_does_nothing(loop: Loop, tiny_llama: Path) -> None:
    server = Server(options(tiny_llama))
    loop.run(server.stop())
    loop.assert_clean()


def test_a_start_that_fails_leaves_nothing(loop: Loop, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        loop.run(Server(options(tmp_path / "nothing")).start())
    loop.assert_clean()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        maddrs = [f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"]
        with pytest.raises(P2PDaemonError):
            loop.run(Server(options(tiny_llama, host_maddrs=maddrs)).start())
    loop.assert_clean()


@pytest.mark.parametrize("fact", [None, "peer_id"], ids=["at once", "while it measures"])
def test_a_start_that_is_cancelled_leaves_nothing(
    loop: Loop, tiny_llama: Path, fact: str | None
) -> None:
    async def cancelled() -> None:
        reached = asyncio.Event()

        def tell(facts: dict[str, Any]) -> None:
            if fact in facts:
                reached.set()

        starting = asyncio.create_task(Server(options(tiny_llama), tell).start())
        await (asyncio.sleep(0) if fact is None else reached.wait())
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    loop.run(cancelled())
    loop.assert_clean()


def test_a_server_whose_daemon_died_leaves_nothing(loop: Loop, tiny_llama: Path) -> None:
    others = set(psutil.Process().children())
    with started(loop, options(tiny_llama)) as (server,):
        for child in set(psutil.Process().children()) - others:
            if "p2pd" in child.name():
                child.kill()
        loop.run(server.daemon_ended())
    loop.assert_clean()


def test_a_step_in_flight_is_answered_before_the_server_stops(loop: Loop, tiny_llama: Path) -> None:
    hidden = torch.randn(1, 200, HIDDEN)

    async def ask(server: Server) -> list[torch.Tensor]:
        node = await Node.start(server.facts["maddrs"], client=True)
        peer = node.p2p.peer_id.from_base58(server.facts["peer_id"])
        session = RawSession(await open_stream(node.p2p, peer, protocol.RPC_INFERENCE))
        uid = protocol.uid_chain(NAME, 0, 5)
        await session.step(uid, hidden[:, :1], max_length=250)
        await session.stream.send(request(uid, hidden[:, 1:], max_length=250))
        while not server.busy:  # noqa: ASYNC110 -- nobody tells when it arrives
            await asyncio.sleep(0.0)
        stopping = asyncio.create_task(server.stop())
        got = await session.receive()
        session.close()
        await stopping
        await node.stop()
        return got

    with started(loop, options(tiny_llama)) as (server,):
        (got,) = loop.run(ask(server))
        assert got.shape == (1, 199, HIDDEN)
    loop.assert_clean()


class LargeOperations(TorchDispatchMode):
    """Torch's operations on large tensors in the thread in which this is entered."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements = elements
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [part for arg in args for part in (arg if isinstance(arg, list) else [arg])]
        if any(isinstance(part, torch.Tensor) and part.numel() > self.elements for part in given):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _watch(function: Callable[..., Any], calls: list[tuple[str, int]]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        found = function(*arguments)
        tensor = found if isinstance(found, torch.Tensor) else arguments[0]
        calls.append((threading.current_thread().name, tensor.numel()))
        return found

    return call


@pytest.mark.parametrize("compression", [tensors.NONE, tensors.INT8], ids=["none", "int8"])
def test_nothing_large_is_computed_or_packed_on_the_event_loop(
    loop: Loop, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, compression: int
) -> None:
    """A prompt in several chunks, a pass forward and one back, all beyond what is done at once."""
    rows, length, large = 16, 150, 40_000
    hidden = torch.randn(rows, length, HIDDEN)
    uid, options_ = protocol.uid_chain(NAME, 0, 5), {"output_compression": [compression]}
    step = request(uid, hidden, max_length=200, **options_)
    forward, back = request(uid, hidden, **options_), request(uid, hidden, hidden, **options_)
    seen: list[str] = []
    packed: list[tuple[str, int]] = []

    async def ask(server: Server) -> list[list[PackedTensor]]:
        node = await Node.start(server.facts["maddrs"], client=True)
        peer = node.p2p.peer_id.from_base58(server.facts["peer_id"])
        answers = []
        with LargeOperations(large) as operations:
            for rpc, message in (
                (protocol.RPC_INFERENCE, step),
                (protocol.RPC_FORWARD_STREAM, forward),
                (protocol.RPC_BACKWARD_STREAM, back),
            ):
                stream = await open_stream(node.p2p, peer, rpc)
                await stream.send(message)
                await stream.send_end() if rpc is not protocol.RPC_INFERENCE else None
                answers.append(list((await stream.receive()).tensors))
                stream.close()
        seen.extend(operations.seen)
        await node.stop()
        return answers

    with started(loop, options(tiny_llama)) as (server,), monkeypatch.context() as patch:
        patch.setattr(tensors, "pack", _watch(tensors.pack, packed))
        patch.setattr(tensors, "unpack", _watch(tensors.unpack, packed))
        answers = loop.run(ask(server))
    assert [answer[0].size for answer in answers] == [(rows, length, HIDDEN)] * 3
    assert not seen
    threads = {name for name, elements in packed if elements > large}
    assert threads == {"codec_0"}
