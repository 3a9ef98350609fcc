"""One model of one swarm, for code that runs in the user's thread.

Notebooks that attach to several models of the same swarm share one node (one p2pd, one DHT peer).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any, TypeVar

import torch

from swarm_notebook.client.audit.auditor import Auditor, Judge
from swarm_notebook.client.loop import LoopThread, at_exit, forget_at_exit, network_thread
from swarm_notebook.client.passes import forward as stateless
from swarm_notebook.client.passes.backward import PassGradients, backward
from swarm_notebook.client.passes.forward import Trail
from swarm_notebook.client.request import Outputs, Request
from swarm_notebook.client.servers.catalogue import served
from swarm_notebook.client.servers.directory import PATIENCE, Directory
from swarm_notebook.client.session.batch import BatchSession
from swarm_notebook.errors import ConnectionFailed, ServerGone
from swarm_notebook.net.dht.records import ModelRecord
from swarm_notebook.net.identity import is_peer_id
from swarm_notebook.net.membership.certificate import Credentials
from swarm_notebook.net.node import Node
from swarm_notebook.progress import Waiting

T = TypeVar("T")

# Passes of so many tokens are shown if they take so many seconds: 256 tokens are half a TFLOP per
# billion parameters, which is seconds on processors.
LONG_PASS, LONG_SECONDS = 256, 2.0


class _SharedNode:
    """A node and how many connections use it."""

    def __init__(self, node: Node):
        self.node, self.users = node, 0


_nodes: dict[frozenset[str], _SharedNode] = {}
_lock = threading.Lock()


class Connection:
    """The blocks of one model in a swarm; blocking calls for the user's thread.

    After `close` they raise ConnectionFailed.

    Args:
        initial_peers: multiaddrs of peers of the swarm.
        prefix: the model's prefix in the DHT.
        num_blocks: how many blocks it has.
        patience: seconds to wait for a server when some blocks have none.
        digest: of the notebook's checkpoint; servers of another one are not used.

    Raises:
        AddressError, ConnectionFailed: from joining the swarm.
    """

    prefix: str
    num_blocks: int

    def __init__(
        self,
        initial_peers: Sequence[str],
        prefix: str,
        num_blocks: int,
        patience: float = PATIENCE,
        digest: str | None = None,
    ):
        self.prefix, self.num_blocks = prefix, num_blocks
        self.network: LoopThread = network_thread()
        self._peers = frozenset(str(peer) for peer in initial_peers)
        self._open = True
        shared = _acquire(self._peers, self.network, patience=patience)
        self.directory: Directory = Directory(
            shared.node, prefix, num_blocks, patience, digest=digest
        )
        self.auditor: Auditor | None = None
        self._when_forgotten: weakref.finalize[Any, Any] | None = None
        try:
            self.network.run(self.directory.start())
        except BaseException:
            self.close()
            raise

    def end_with_me(self, end: Callable[[], object]) -> None:
        """Once nobody holds this connection any more, leave the swarm and call ``end``."""
        self._when_forgotten = weakref.finalize(
            self, _forgotten, self._peers, self.network, self.directory, end
        )
        self._when_forgotten.atexit = False

    @property
    def initial_peers(self) -> list[str]:
        return sorted(self._peers)

    @property
    def in_touch(self) -> bool:
        """Whether any peer of the swarm has answered the last time it was asked."""
        return self.directory.node.in_touch

    @property
    def is_open(self) -> bool:
        return self._open

    def audit(self, rate: float, judge: Judge | None = None) -> None:
        """From now on, audit what servers answer, see `Auditor`."""
        self.auditor = self.directory.audits = Auditor(self.directory, rate, judge)

    def await_audits(self, seconds: float) -> None:
        """Wait for audits that are under way, for so long at most."""
        if self.auditor is not None:
            self.run(_within(seconds, self.auditor.settled))

    def session(self, max_length: int | None = None) -> BatchSession:
        """A new session without servers yet; its first step chooses them."""
        return BatchSession(self.directory, max_length)

    def step(
        self,
        session: BatchSession,
        block: int,
        stop: int,
        states: Collection[int],
        inner: Collection[tuple[int, str]] = (),
        *,
        last: int | None = None,
    ) -> Outputs:
        """`BatchSession.step` of blocks ``[block, stop)``; shows how far a long one is."""
        length = session.length
        work = session.step(block, stop, states, inner, last=last)
        if length < LONG_PASS:
            return self.run(work)
        with Waiting(
            f"Reading {length} tokens",
            total=stop - block,
            unit="blocks",
            count=lambda: session.passed // length,
            after=LONG_SECONDS,
        ):
            return self.run(work)

    def forward(self, request: Request, *, keep: bool = False) -> tuple[Outputs, list[Trail]]:
        return self.run(stateless.forward(self.directory, request, keep=keep))

    def backward(
        self,
        request: Request,
        trails: Sequence[Trail],
        grad: torch.Tensor,
        states: Collection[int],
    ) -> PassGradients:
        return self.run(backward(self.directory, request, trails, grad, states))

    def info(self, peer: str) -> dict[str, Any]:
        """What a server says of itself when it is asked (its base58 id).

        Raises:
            ServerGone: it does not answer.
            ValueError: this is no peer's id.
        """
        if not is_peer_id(peer):
            raise ValueError(f"peer_id: {peer!r} is not a peer id; `swarm.status()` shows them")
        found = self.run(self.directory.try_info(peer))
        if found is None:
            raise ServerGone(f"server {peer} does not answer")
        return found

    def refresh(self, limit: float | None = None) -> None:
        """Read what the servers announce now, instead of within seconds.

        Args:
            limit: seconds to wait for it; None waits to the end.
        """
        self.run(_within(limit, self.directory.refresh))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for what the network thread does for us.

        Raises:
            ConnectionFailed: the connection was closed.
        """
        if not self._open:
            work.close()
            raise ConnectionFailed(
                f"{self.prefix}: this notebook has disconnected from the swarm; connect again"
            )
        return self.network.run(work)

    def close(self) -> None:
        """Leave the swarm, unless another model of it is still attached."""
        if self._open:
            self._open = False
            if self._when_forgotten is not None:
                self._when_forgotten.detach()
            if self.auditor is not None:
                self.network.loop.call_soon_threadsafe(self.auditor.stop)
            self.network.run(self.directory.stop())
            _release(self._peers, self.network)


class Inquiry:
    """Asks servers of a swarm what they do, without attaching to a model.

    Args:
        initial_peers: multiaddrs of peers of the swarm.
        credentials: of whoever began it, if it is private.

    Raises:
        AddressError, ConnectionFailed: from joining the swarm.
    """

    def __init__(self, initial_peers: Sequence[str], credentials: Credentials | None = None):
        self._network = network_thread()
        peers = [str(peer) for peer in initial_peers]
        # Not a node that others of this process have, who may be no members.
        self._peers = frozenset(peers if credentials is None else [*peers, credentials.swarm.hex()])
        shared = _acquire(self._peers, self._network, peers, credentials)
        self._directory = Directory(shared.node, "", 0)

    def info(self, peer: str) -> dict[str, Any] | None:
        """What a server says of itself; None if it does not answer within seconds."""
        return self._network.run(self._directory.try_info(peer))

    def close(self) -> None:
        """Leave the swarm, unless others of this process are still there."""
        _release(self._peers, self._network)


async def _within(seconds: float | None, work: Callable[[], Awaitable[None]]) -> None:
    """Wait for some work, for so long at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work()


def served_models(
    initial_peers: Sequence[str], limit: float | None = None
) -> dict[str, ModelRecord]:
    """The models that a swarm serves, by DHT prefix; see `catalogue.served`.

    Args:
        limit: seconds to wait for it; None waits to the end.

    Raises:
        TimeoutError: it did not come in time.
    """
    network = network_thread()
    peers = frozenset(str(peer) for peer in initial_peers)
    shared = _acquire(peers, network)

    async def read() -> dict[str, ModelRecord]:
        async with asyncio.timeout(limit):
            return await served(shared.node)

    try:
        return network.run(read())
    finally:
        _release(peers, network)


def _acquire(
    peers: frozenset[str],
    network: LoopThread,
    addresses: Sequence[str] | None = None,
    credentials: Credentials | None = None,
    patience: float = PATIENCE,
) -> _SharedNode:
    """The node that goes by ``peers``; its ``addresses``, if these are not all of them."""
    with _lock:
        shared = _nodes.get(peers)
        if shared is None:
            given = sorted(peers) if addresses is None else addresses
            starting = Node.start(given, client=True, credentials=credentials, patience=patience)
            node = network.run(starting)
            at_exit(node.stop)
            shared = _nodes[peers] = _SharedNode(node)
        shared.users += 1
        return shared


def _forgotten(
    peers: frozenset[str], network: LoopThread, directory: Directory, end: Callable[[], object]
) -> None:
    """A connection was garbage, in whichever thread: what follows may take its time elsewhere."""

    def leave() -> None:
        network.run(directory.stop())
        _release(peers, network)
        end()

    threading.Thread(target=leave, name="swarm_notebook-leave", daemon=True).start()


def _release(peers: frozenset[str], network: LoopThread) -> None:
    with _lock:
        shared = _nodes[peers]
        shared.users -= 1
        if shared.users == 0:
            del _nodes[peers]
            forget_at_exit(shared.node.stop)
            network.run(shared.node.stop())
