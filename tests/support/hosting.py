"""Servers in the test's own process: the real thing, but for the process around it.

`HostedSwarm` is to tests what `LocalSwarm` is to users, and costs no start of an interpreter with
torch in it. Each server has its network daemon, its torch thread and a real network between itself
and whoever asks it; only what is about processes (kills, signals, their memory, their output)
needs a `LocalSwarm` or a `ServerProcess`.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from hivemind.p2p import PeerID

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.client.connection import Connection
from swarm_notebook.client.loop import LoopThread
from swarm_notebook.local.swarm import plan_spans
from swarm_notebook.net.dht.records import ServerState
from swarm_notebook.net.node import Node
from swarm_notebook.server.app import Server
from swarm_notebook.server.engine import throughput
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.options import ServeOptions
from swarm_notebook.server.presence.reunion import Reunion
from swarm_notebook.swarm import Swarm

# No test rests on how fast a server finds itself, and a run of all tests starts some hundreds.
throughput.SECONDS /= 20
_measure = throughput.measure
_measured: dict[tuple[Any, ...], throughput.Throughput] = {}


def _alike(span: Span, hidden_size: int, batching: Batching | None = None) -> Any:
    """What the first one measured: of servers that start at once on a busy machine one finds itself
    twice as fast as another, and long work goes there, wherever the next token would go.
    """
    key = hidden_size, span.dtype, span.device.type
    if key not in _measured:
        _measured.setdefault(key, _measure(span, hidden_size, batching))
    return _measured[key]


@functools.cache
def _thread() -> LoopThread:
    """The thread whose loop all servers of this process share; not the notebook side's own."""
    return LoopThread()


class HostedServer:
    """A server in this process, up as long as its context."""

    def __init__(self, options: ServeOptions, known: Mapping[str, Sequence[str]] | None = None):
        self.options = options
        self.listens = asyncio.Event()
        self._server = Server(options, self._told, known=known or {})

    @property
    def facts(self) -> dict[str, Any]:
        """What ``swarm-notebook serve`` would print."""
        return self._server.facts

    @property
    def name(self) -> str | None:
        return self.options.name

    @property
    def blocks(self) -> tuple[int, int]:
        start, end = self.facts["blocks"]
        return start, end

    @property
    def peer_id(self) -> str:
        return self.facts["peer_id"]

    @property
    def peer(self) -> PeerID:
        return PeerID.from_base58(self.peer_id)

    @property
    def addresses(self) -> list[str]:
        return self.facts["maddrs"]

    @property
    def layers(self) -> list[Any]:
        """The modules of its blocks, for those who change what it computes."""
        return list(self.handler._span.layers)

    @property
    def handler(self) -> Any:
        """What answers requests, for those who change how."""
        up: Any = self._server._up
        return up.handler

    @property
    def sessions_served(self) -> int:
        """As it says when it is asked."""
        count: int = self.handler._counters.sessions
        return count

    @property
    def ready(self) -> bool:
        return self.facts.get("ready", False)

    running = ready

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        """Leave the swarm in good order."""
        await self._server.stop()
        self.facts.pop("ready", None)

    @property
    def node(self) -> Node:
        up = self._server._up
        assert up is not None
        return up.node

    def acquaintances(self) -> dict[str, list[str]]:
        """See `Node.acquaintances`."""
        return _thread().run(self.node.acquaintances())

    def forget_records(self) -> None:
        """As a keeper in the DHT, lose all that it keeps."""
        _thread().loop.call_soon_threadsafe(self.node.dht.protocol.storage.clear)

    def announce(self) -> None:
        """Say now what it says once per period."""
        up: Any = self._server._up
        assert _thread().run(up.announcer.announce(up.describe(ServerState.ONLINE)))

    def lose(self, other: HostedServer) -> None:
        """Be as after calls to another one that nobody answered, with no record of it."""
        _thread().run(self._lose(other))

    async def _lose(self, other: HostedServer) -> None:
        table = self.node.dht.protocol.routing_table
        del table[table.get(peer_id=other.peer)]
        self.node.dht.protocol.storage.clear()
        await self.node.p2p._client.disconnect(other.peer)

    @property
    def _reunion(self) -> Reunion:
        reunion = self._server._reunion
        assert reunion is not None
        return reunion

    def remembers(self, other: HostedServer) -> bool:
        """Whether it would find another one again that it has lost."""
        return bool(self._reunion.addresses(other.peer_id))

    def hear_of(self, other: HostedServer) -> None:
        """Be told by the local network where another server of the swarm is."""
        _thread().loop.call_soon_threadsafe(self._reunion.hear, other.peer_id, other.addresses)

    def _told(self, facts: dict[str, Any]) -> None:
        if "maddrs" in facts:
            self.listens.set()

    def __enter__(self) -> Self:
        _thread().run(self.start())
        return self

    def __exit__(self, *_: object) -> None:
        _thread().run(self.stop())


class HostedSwarm:
    """A swarm of servers in this process.

    Args:
        model: as for `LocalSwarm`.
        servers: how many servers share the blocks evenly, or each one's ``(start, end)``.
        options: further fields of `ServeOptions`, the same for all.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        servers: int | Sequence[tuple[int, int]] = 2,
        **options: Any,
    ):
        source = resolve(model)
        self.model = str(source.path or source.name)
        self.servers: list[HostedServer] = []
        spans = plan_spans(source.config().num_hidden_layers, servers)
        found = throughput.measure
        if found is _measure:  # no test has said how fast they are
            throughput.measure = _alike
        try:
            _thread().run(self._start(spans, options))
        except BaseException:
            self.close()
            raise
        finally:
            throughput.measure = found

    async def _start(self, spans: list[tuple[int, int]], options: dict[str, Any]) -> None:
        """All at once; the others join the first as soon as it listens."""
        async with asyncio.TaskGroup() as starting:
            peers: list[str] = []
            for number, span in enumerate(spans):
                name = f"local-{number}"
                server = HostedServer(ServeOptions(self.model, span, peers, name=name, **options))
                self.servers.append(server)
                starting.create_task(server.start())
                if not peers:
                    await server.listens.wait()
                    peers = server.addresses

    def next_of(self, notebook: Swarm) -> HostedServer:
        """The first server of the route that a notebook's next request takes."""
        first = notebook.route().hops[0].peer_id
        return next(server for server in self.servers if server.peer_id == first)

    @property
    def initial_peers(self) -> list[str]:
        return [address for server in self.servers if server.ready for address in server.addresses]

    @contextmanager
    def with_a_node(self) -> Iterator[list[str]]:
        """Its addresses. Notebooks that connect to them meanwhile share a node, which is up."""
        source, peers = resolve(self.model), self.initial_peers
        held = Connection(peers, source.dht_prefix, source.config().num_hidden_layers)
        try:
            yield peers
        finally:
            held.close()

    @contextmanager
    def hung(self) -> Iterator[None]:
        """All of them stand still and answer nothing, though their daemons do."""
        going_on = threading.Event()
        _thread().loop.call_soon_threadsafe(going_on.wait)
        try:
            yield
        finally:
            going_on.set()

    def close(self) -> None:
        _thread().run(self._stop())

    async def _stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self.servers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
