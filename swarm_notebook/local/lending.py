"""Lending this machine's memory to a swarm: a server process that a notebook starts and ends.

    lending = sn.Lending("org/name", (0, 15), swarm=swarm)
    lending.start()
    lending.state, lending.facts()     # "serving", what it does
    lending.stop()

The process is that of ``swarm-notebook serve``; it ends with the notebook. Nothing here blocks for
long but `stop`, which gives requests in flight a few seconds to be answered.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.client.connection import Inquiry
from swarm_notebook.errors import BlocksOutOfRange, InvitationError, ServerStartError
from swarm_notebook.local.folder import ServerFolder
from swarm_notebook.local.process import ANY_INTERFACE, ANY_PORT, LocalServer
from swarm_notebook.local.swarm import Conversion
from swarm_notebook.net.addresses import addresses_of
from swarm_notebook.net.membership import INVITATION_SECONDS
from swarm_notebook.net.membership.authority import Authority, swarms_folder

if TYPE_CHECKING:
    from swarm_notebook.swarm import Swarm

STATES = ("stopped", "starting", "loading", "measuring", "serving", "failed")


class Lending:
    """One server process of this notebook, to be started and stopped again.

    Args:
        model: a Hub id, a folder or a GGUF file; None takes the swarm's, or the demo model.
        blocks: ``(start, end)`` to hold; None takes what the swarm lacks, else all blocks; with
            ``memory`` or ``lan`` the server chooses then.
        swarm: an attached swarm to serve in.
        initial_peers: addresses of the swarm to join, if none is attached; none begin a new one.
        dtype: what to compute in; "auto" is the checkpoint's on a GPU, on a CPU float32, and
            bfloat16 if weights are packed to fit into the memory.
        bits: per weight, from 2.5 to 16; None leaves the weights as they are.
        memory: for weights, in bytes or such as ``"2GB"``: as many blocks as it holds as they are,
            or else at ``bits`` or at what is measured to be good enough, and then at the most bits.
        device: where, such as ``"cuda:1"``; "auto" is a GPU where there is one.
        threads: CPU threads; None leaves it to torch.
        name: what others see in their status.
        listen: multiaddr to listen at; None takes the loopback interface if all known peers are
            there, else all interfaces.
        private: begin a swarm in which only those are let in who are invited, see `invite`.
        lan: be found on the local network, and join the swarm of the model that is found there.

    Attributes:
        config: of the model.

    Raises:
        ModelNotFound: there is no such model.
        BlocksOutOfRange: it has no such blocks.
        ValueError: ``private``, and peers of a swarm that is there.
    """

    model: str
    dtype: str
    device: str
    bits: float | None
    memory: int | str | None

    num_blocks: Any

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        blocks: tuple[int, int] | None = None,
        *,
        swarm: Swarm | None = None,
        initial_peers: Sequence[str] = (),
        dtype: str = "auto",
        device: str = "auto",
        bits: float | None = None,
        memory: int | str | None = None,
        threads: int | None = None,
        name: str = "notebook",
        listen: str | None = None,
        private: bool = False,
        lan: bool = False,
    ) -> None:
        self._peers = swarm.initial_peers if swarm is not None else list(initial_peers)
        with Conversion() as progress:
            source = resolve(swarm.name if model is None and swarm else model, progress=progress)
        self.config = source.config()
        self.model, self.num_blocks = source.name, self.config.num_hidden_layers
        self._path, self._name, self._threads = str(source.path or source.name), name, threads
        self._swarm: Path | None = None
        if private:
            if self._peers:
                raise ValueError("private starts a swarm, initial_peers joins one: give only one")
            self._swarm = swarms_folder() / Path(self.model).name
        alone = _all_loopback(self._peers) and not lan
        self._listen = listen or (ANY_PORT if alone else ANY_INTERFACE)
        self._lan = lan
        self._folder: ServerFolder | None = None
        self._key: bytes | None = None  # others know it under the same peer id when it comes back
        self._server: LocalServer | None = None
        self._inquiry: Inquiry | None = None
        self.dtype, self.device, self.bits, self.memory = dtype, device, bits, memory
        self._chooses, self._blocks = False, (0, 0)
        self.blocks = blocks or _lacking(swarm) or (0, self.num_blocks)
        self._chooses = blocks is None and (memory is not None or lan)

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks to hold, ``(start, end)``; a change counts from the next start on.

        Where the server chooses, and until they are set: those that the server has chosen.
        """
        if self._chooses and self._server is not None:
            return self._server.blocks
        return self._blocks

    @blocks.setter
    def blocks(self, blocks: tuple[int, int]) -> None:
        start, end = blocks
        if not 0 <= start < end <= self.num_blocks:
            raise BlocksOutOfRange(
                f"blocks: {start}:{end}, but {self.model} has blocks 0:{self.num_blocks}"
            )
        if (start, end) != self.blocks:
            self._chooses = False
        self._blocks = (start, end)

    @property
    def state(self) -> str:
        """One of `STATES`."""
        server = self._server
        if server is None:
            return "stopped"
        if not server.running:
            return "failed"
        if server.ready:
            return "serving"
        done, total = server.weights
        if total and done == total:
            return "measuring"
        return "loading" if total else "starting"

    @property
    def weights(self) -> tuple[int, int]:
        """Bytes of the weights that were read, and all of them."""
        return (0, 0) if self._server is None else self._server.weights

    @property
    def peer_id(self) -> str:
        """Its peer id, as soon as it listens."""
        return (self._server.peer_id or "") if self._server is not None else ""

    @property
    def addresses(self) -> list[str]:
        """Where it listens: what others need to join."""
        return [] if self._server is None else self._server.addresses

    @property
    def private(self) -> bool:
        """Whether others need an invitation, and not an address, to join."""
        return self._swarm is not None

    @property
    def pid(self) -> int | None:
        """The process id of the latest start."""
        return None if self._server is None else self._server.pid

    def start(self) -> None:
        """Start the process; it loads its blocks and announces them by itself.

        Raises:
            ServerStartError: it runs already.
        """
        if self._server is not None and self._server.running:
            raise ServerStartError(f"{self!r} runs already; stop it first")
        self.stop()
        self._folder = ServerFolder()
        self._server = LocalServer(
            self._name,
            self._blocks,
            self._path,
            chooses=self._chooses,
            folder=self._folder,
            swarm_addresses=lambda: self._peers,
            listen=self._listen,
            key=self._key,
            threads=self._threads,
            dtype=self.dtype,
            device=self.device,
            bits=self.bits,
            memory=self.memory,
            lan=self._lan,
            private=self.private,
            swarm=self._swarm,
        )
        atexit.register(self.stop)
        self._server.launch()
        self._server.join(self._peers)

    def facts(self) -> dict[str, Any] | None:
        """What the server tells of itself (its rpc_info); None unless it serves and answers.

        Among them: sessions (open now), sessions_served, requests_served, tokens_served,
        cache_tokens_available, cache_tokens_total.
        """
        if self.state != "serving":
            return None
        if self._inquiry is None:
            owner = None if self._swarm is None else Authority(self._swarm).owner()
            self._inquiry = Inquiry(self._peers or self.addresses, owner)
        return self._inquiry.info(self.peer_id)

    def invite(
        self, role: str = "notebook", *, expires: float = INVITATION_SECONDS, uses: int = 1
    ) -> str:
        """What to hand to somebody who is to join, see `LocalSwarm.invite`.

        Raises:
            InvitationError: it is not private, or does not serve yet.
            ValueError: an argument is none.
        """
        if self._swarm is None:
            raise InvitationError("this server is open to everybody; start one with private=True")
        return str(Authority(self._swarm).invite(role, expires=expires, uses=uses))

    def stop(self) -> None:
        """Let the server leave the swarm and end; returns when it is gone."""
        atexit.unregister(self.stop)
        if self._inquiry is not None:
            self._inquiry.close()
            self._inquiry = None
        if self._server is not None:
            self._blocks = self._server.blocks
            self._server.terminate()
            self._key, self._server = self._server.key, None
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def log_tail(self, lines: int = 12) -> str:
        """The last lines of the server's log."""
        return "" if self._server is None else self._server.log_tail(lines)

    def __repr__(self) -> str:
        start, end = self.blocks
        return f"<Lending blocks {start}:{end} of {Path(self.model).name}: {self.state}>"


def _lacking(swarm: Swarm | None) -> tuple[int, int] | None:
    """The first run of blocks that nobody serves."""
    if swarm is None:
        return None
    runs = swarm.status(refresh=False).coverage
    return next(((start, end) for start, end, count in runs if count == 0), None)


def _all_loopback(peers: Sequence[str]) -> bool:
    peers = addresses_of(peers)
    return bool(peers) and all("/ip4/127." in peer or "/ip6/::1/" in peer for peer in peers)
