"""How servers end: told to, with their parent, killed. Each test ends one server.

The sixth stays, so that in any order somebody keeps what those that leave say of themselves.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from hivemind.p2p import P2PDaemonError, PeerID
from support.patience import PATIENCE, within
from support.raw_wire import RawClient, RawSession, ServerProcess, request

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import AddressError, ShuttingDown
from swarm_notebook.net.dht.records import (
    MODEL_INDEX_KEY,
    ServerInfo,
    ServerState,
    parse_model_record,
    parse_record,
)
from swarm_notebook.net.wire import protocol
from swarm_notebook.net.wire.streams import LINGER_SECONDS
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.options import ServeOptions
from swarm_notebook.server.process import serve, server_loop

PREFIX, BLOCKS = "tiny-llama", 5
UID = protocol.uid_chain(PREFIX, 0, BLOCKS)


class Swarm:
    """Servers that all hold the whole model, and a client."""

    def __init__(self, servers: list[ServerProcess], client: RawClient):
        self.servers, self.client = servers, client
        self.begun = [self.record(server.peer) for server in servers]

    def record(self, peer: PeerID) -> ServerInfo | None:
        """What the DHT says of a server, under its last block."""
        uid = protocol.block_uid(PREFIX, BLOCKS - 1)
        entry = self.client.run(self.client.node.dht.get(uid, latest=True))
        return parse_record(entry.value[peer.to_base58()].value)


@pytest.fixture(scope="module")
def swarm(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    folder = tmp_path_factory.mktemp("lifetime")
    with ExitStack() as stack:
        servers: list[ServerProcess] = []

        def start(*options: str) -> None:
            name = f"server {len(servers)}"
            log = folder / f"{name}.log"
            servers.append(ServerProcess(tiny_llama, log, "--name", name, *options))
            stack.callback(servers[-1].kill)

        start()
        servers[0].wait_listening()
        for _ in range(5):
            start("--initial-peers", *servers[0].facts["maddrs"])
        for server in servers:
            server.wait_ready()
        client = RawClient([address for server in servers for address in server.facts["maddrs"]])
        stack.callback(client.close)
        yield Swarm(servers, client)


def daemon_of(server: ServerProcess) -> psutil.Process:
    (daemon,) = (
        child for child in psutil.Process(server.process.pid).children() if "p2pd" in child.name()
    )
    return daemon


def assert_gone(process: psutil.Process) -> None:
    gone, _ = psutil.wait_procs([process], timeout=PATIENCE)
    assert gone, "the daemon outlives its server"


def test_the_ready_line_and_the_records(swarm: Swarm) -> None:
    for number, (server, info) in enumerate(zip(swarm.servers, swarm.begun, strict=True)):
        assert server.facts["blocks"] == [0, BLOCKS]
        assert server.facts["pid"] == server.process.pid
        assert info is not None
        assert (info.state, info.public_name) == (ServerState.ONLINE, f"server {number}")
        assert (info.start_block, info.end_block) == (0, BLOCKS)
        assert info.inference_rps is not None
        assert info.forward_rps is not None
        assert info.forward_rps > info.inference_rps > 1
        assert info.part_tokens in (64, 128, 256, 512, 1024)
    index = swarm.client.run(swarm.client.node.dht.get(MODEL_INDEX_KEY, latest=True))
    model = parse_model_record(index.value[PREFIX].value)
    assert model is not None
    assert model.num_blocks == BLOCKS


def test_sigterm_finishes_the_step_in_flight(swarm: Swarm, tiny_llama: Path) -> None:
    server, client = swarm.servers[3], swarm.client
    daemon = daemon_of(server)
    hidden = torch.randn(30, 200, 48)

    async def work() -> tuple[torch.Tensor, tuple[RawSession, RawSession]]:
        session, idle = await client.session(server.peer), await client.session(server.peer)
        await idle.step(UID, hidden[:1, :2])
        await session.stream.send(request(UID, hidden))
        free = (await client.info(server.peer))["cache_tokens_total"] - 64
        while (await client.info(server.peer))["cache_tokens_free"] == free:
            pass  # the step has not begun
        server.process.send_signal(signal.SIGTERM)
        (got,) = await session.receive()
        for each in (session, idle):
            with pytest.raises(ShuttingDown, match="leaving"):
                await each.receive()
        return got, (session, idle)

    got, left = client.run(work())
    with within(LINGER_SECONDS / 2):  # streams that nobody closes are not waited for
        assert server.process.wait(PATIENCE) == 0
    for each in left:
        each.close()
    loaded = load_blocks(resolve(tiny_llama), 0, BLOCKS, dtype=torch.float32)
    expected = Span(loaded.decoder, loaded.layers_name, 0).run(0, BLOCKS, hidden)[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert_gone(daemon)
    info = swarm.record(server.peer)
    assert info is not None
    assert info.state == ServerState.OFFLINE


@pytest.mark.parametrize(("number", "how"), [(2, "interrupt"), (1, "end of stdin")])
def test_leaves_with_exit_code_zero(swarm: Swarm, number: int, how: str) -> None:
    server = swarm.servers[number]
    daemon = daemon_of(server)
    if how == "interrupt":
        server.process.send_signal(signal.SIGINT)
    else:
        server.process.stdin.close()
    assert server.process.wait(PATIENCE) == 0
    assert_gone(daemon)
    info = swarm.record(server.peer)
    assert info is not None
    assert info.state == ServerState.OFFLINE


def test_the_daemon_does_not_outlive_a_killed_server(swarm: Swarm) -> None:
    server = swarm.servers[0]
    daemon = daemon_of(server)
    server.process.kill()
    assert_gone(daemon)
    with pytest.raises(P2PDaemonError):
        swarm.client.run(swarm.client.info(server.peer))


def test_a_server_whose_daemon_dies_says_so(swarm: Swarm) -> None:
    server = swarm.servers[4]
    daemon_of(server).kill()
    assert server.process.wait(PATIENCE) == 1
    assert "error: the network daemon (p2pd) of this server has died" in server.log.read_text()


def test_what_cannot_be_served_ends_with_its_error(tiny_llama: Path, tmp_path: Path) -> None:
    wrong = {
        "blocks 3:6": ["--blocks", "3:6"],
        "initial_peers": ["--initial-peers", "/ip4/127.0.0.1"],
    }
    servers = [
        ServerProcess(tiny_llama, tmp_path / f"{number}.log", *options)
        for number, options in enumerate(wrong.values())
    ]
    try:
        for server, message in zip(servers, wrong, strict=True):
            assert server.process.wait(PATIENCE) == 1
            assert message in server.log.read_text().splitlines()[-1]
    finally:
        for server in servers:
            server.kill()


def test_torch_is_not_at_work_when_python_ends(tiny_llama: Path) -> None:
    """It would abort the process, with another exit code than that of the error."""
    options = ServeOptions(str(tiny_llama), initial_peers=["/ip4/127.0.0.1"])
    before = set(threading.enumerate())
    with pytest.raises(AddressError), asyncio.Runner(loop_factory=server_loop) as runner:
        runner.run(serve(options))
    begun = set(threading.enumerate()) - before
    assert "compute" not in {thread.name for thread in begun}
