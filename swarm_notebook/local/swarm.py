"""A swarm on this machine: server processes on the loopback interface, started and ended here.

    with sn.LocalSwarm(servers=2) as local:
        swarm = sn.connect(local.initial_peers)

All processes start at once, for most of their start is importing; the others join the first as
soon as it listens. Closing the swarm (or leaving this process, in whatever way) ends them. See
`process` for the life of one of them.
"""

from __future__ import annotations

import atexit
import itertools
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from swarm_notebook.errors import InvitationError
from swarm_notebook.local.folder import ServerFolder
from swarm_notebook.local.process import (
    ANY_INTERFACE,
    ANY_PORT,
    POLL_SECONDS,
    START_SECONDS,
    TERMINATE_SECONDS,
    LocalServer,
)
from swarm_notebook.net.membership import INVITATION_SECONDS
from swarm_notebook.progress import Waiting
from swarm_notebook.report.formatting import count as counted
from swarm_notebook.report.formatting import size

if TYPE_CHECKING:
    from swarm_notebook.net.membership.authority import Authority, Member

__all__ = ["LocalServer", "LocalSwarm"]

# What bits are worth takes 78 s for the demo model's 30 blocks on one busy core, and is measured
# once; a block of an 8B model is 60 of these.
MEASURE_SECONDS = 3600.0
STOP_SECONDS = TERMINATE_SECONDS  # for all servers together: they leave at the same time


class LocalSwarm:
    """Server processes on this machine that hold a model between them.

    Args:
        model: a Hub id, a folder or a GGUF file; None is the demo model.
        servers: how many servers share the blocks evenly, or each one's ``(start, end)``.
        dtype: what the servers compute in; "auto" is the checkpoint's on a GPU, on a CPU float32,
            and bfloat16 if weights are packed to fit into the memory.
        device: where, such as ``"cuda"``; "auto" is a GPU where there is one.
        bits: per weight of the blocks' matrices, from 2.5 to 16, scales included; None leaves them
            as they are. On a CPU, ``dtype`` "auto" is then bfloat16.
        memory: for the weights of each server, in bytes or such as ``"2GB"``. Where its blocks do
            not fit as they are, they get the most bits that do; fewer than ``bits``, or than is
            measured to be good enough, are refused.
        threads: CPU threads per server; None leaves it to torch.
        cache_tokens: room for keys and values per server; None is the server's default.
        reproducible: what a session gets does not depend on who else is served, to the bit.
        private: only those who are invited get anything of it, see `invite`.
        lan: listen on all interfaces, be found on the local network by ``connect(lan=True)``, and
            join the swarm of the model that is found there.
        start_timeout: seconds until every server must be ready; None is `START_SECONDS`, or
            `MEASURE_SECONDS` where bits may have to be measured.

    Raises:
        ModelNotFound: there is no such model.
        ServerStartError: a server did not come up; the message has the end of its log, and where
            the whole of it is kept.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        servers: int | Sequence[tuple[int, int]] = 2,
        *,
        dtype: str = "auto",
        device: str = "auto",
        bits: float | None = None,
        memory: int | str | None = None,
        threads: int | None = None,
        cache_tokens: int | None = None,
        reproducible: bool = False,
        private: bool = False,
        lan: bool = False,
        start_timeout: float | None = None,
    ) -> None:
        # Found here, once, with progress; the servers get a place that is known to exist.
        from swarm_notebook.checkpoint.files.source import resolve

        with Conversion() as progress:
            source = resolve(model, progress=progress)
        spans = plan_spans(source.config().num_hidden_layers, servers)
        self.model: str = str(source.path or source.name)
        self._folder = ServerFolder()
        self._swarm = self._folder.path / "swarm" if private else None
        self.servers: list[LocalServer] = [
            LocalServer(
                f"local-{index}",
                span,
                self.model,
                folder=self._folder,
                swarm_addresses=lambda: self.initial_peers,
                listen=ANY_INTERFACE if lan else ANY_PORT,
                threads=threads,
                dtype=dtype,
                device=device,
                bits=bits,
                memory=memory,
                lan=lan,
                cache_tokens=cache_tokens,
                reproducible=reproducible,
                private=private,
                swarm=self._swarm,
            )
            for index, span in enumerate(spans)
        ]
        atexit.register(self.close)
        _swarms.add(self)
        try:
            limit = START_SECONDS if bits is None and memory is None else MEASURE_SECONDS
            name = source.path.name if source.path else source.name
            self._start(name, limit if start_timeout is None else start_timeout)
        except BaseException:  # an interrupt, too, must not leave processes behind
            self.close()
            raise

    @property
    def initial_peers(self) -> list[str]:
        """The addresses of all servers that are up: what `connect` needs."""
        return [
            address for server in self.servers if server.running for address in server.addresses
        ]

    @property
    def private(self) -> bool:
        """Whether only those who are invited get anything of it."""
        return self._swarm is not None

    def invite(
        self, role: str = "notebook", *, expires: float = INVITATION_SECONDS, uses: int = 1
    ) -> str:
        """What to hand to somebody who is to join: ``sn.connect(INVITE)``, and nothing else.

        Args:
            role: "notebook", or "server" for `swarm-notebook serve --join INVITE`.
            expires: in how many seconds it cannot be redeemed any more.
            uses: how many may redeem it.

        Raises:
            InvitationError: the swarm is public, or none of its servers runs.
            ValueError: an argument is none.
        """
        return str(self._authority().invite(role, expires=expires, uses=uses))

    def members(self) -> list[Member]:
        """Who has redeemed an invitation.

        Raises:
            InvitationError: the swarm is public.
        """
        return self._authority().members()

    def revoke(self, name: str) -> list[Member]:
        """Shut a member out, or all who came by an invitation; who that is.

        Args:
            name: as `members` shows it; or an invitation.

        Raises:
            InvitationError: nobody is called so, or the swarm is public.
        """
        return self._authority().revoke(name)

    def _authority(self) -> Authority:
        from swarm_notebook.net.membership.authority import Authority

        if self._swarm is None:
            raise InvitationError(
                "this swarm is open to everybody; start a private one with "
                "sn.LocalSwarm(private=True)"
            )
        return Authority(self._swarm)

    @staticmethod
    def model_at(peers: Sequence[str]) -> str | None:
        """The model of the swarm of this process that listens at one of these addresses."""
        return next((one.model for one in _swarms if {*one.initial_peers} & {*peers}), None)

    @staticmethod
    def private_here() -> list[LocalSwarm]:
        """The private swarms of this process that run."""
        return [one for one in list(_swarms) if one.private and one.initial_peers]

    def close(self) -> None:
        """End all servers, wait until they are gone and remove their logs.

        The log of a server that had ended by an error is kept; a warning says where.
        """
        for server in self.servers:
            server.request_stop()
        deadline = time.monotonic() + STOP_SECONDS
        for server in self.servers:
            server.terminate(max(deadline - time.monotonic(), 0))
        self._folder.remove()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        spans = ", ".join(f"{start}:{end}" for start, end in (s.blocks for s in self.servers))
        return f"<LocalSwarm {Path(self.model).name}: blocks {spans}>"

    def _start(self, name: str, timeout: float) -> None:
        first, *others = self.servers
        count = len(self.servers)
        for server in self.servers:
            server.launch()
        first.join([])
        with Waiting(
            f"Starting {counted(count, 'server')} of {name}",
            total=count,
            unit="ready",
            count=self._ready,
            detail=self._loading,
        ):
            for _ in self._watch(timeout):
                if first.addresses:
                    for server in others:
                        server.join(first.addresses)
                    others = []
                if self._ready() == count:
                    return

    def _ready(self) -> int:
        return sum(server.ready for server in self.servers)

    def _loading(self) -> str:
        """How much of the weights the servers have read, while they read."""
        parts = [server.weights for server in self.servers]
        read, whole = sum(part[0] for part in parts), sum(part[1] for part in parts)
        return f"{size(read)} of {size(whole)} of weights read" if read < whole else ""

    def _watch(self, timeout: float) -> Iterator[None]:
        """Tick while the servers start; raise ServerStartError if one fails or time is up."""
        deadline = time.monotonic() + timeout
        while True:
            yield
            for server in self.servers:
                server.check()
            if time.monotonic() > deadline:
                late = next(server for server in self.servers if not server.ready)
                raise late.start_error(f"took more than {timeout:.0f} s")
            time.sleep(POLL_SECONDS)


_swarms: weakref.WeakSet[LocalSwarm] = weakref.WeakSet()


def plan_spans(num_blocks: int, servers: int | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The blocks of each server, from their number or as given.

    Raises:
        ValueError: more servers than blocks, or blocks that the model does not have.
    """
    if isinstance(servers, int):
        if not 1 <= servers <= num_blocks:
            raise ValueError(
                f"servers={servers}: a model of {num_blocks} blocks can be split between "
                f"1 and {num_blocks} servers"
            )
        cuts = [round(index * num_blocks / servers) for index in range(servers + 1)]
        return list(itertools.pairwise(cuts))
    spans = [(int(start), int(end)) for start, end in servers]
    for start, end in spans:
        if not 0 <= start < end <= num_blocks:
            raise ValueError(
                f"servers: blocks {start}:{end} are not in the model, which has blocks "
                f"0:{num_blocks}"
            )
    if not spans:
        raise ValueError("servers: an empty list starts no server")
    return spans


class Conversion(Waiting):
    """Shows how far the conversion of the demo model is, which happens once."""

    def __init__(self) -> None:
        super().__init__("Looking for the model", detail=self._amount)
        self._done = self._total = 0

    def __call__(self, done: int, total: int) -> None:
        self.say("Preparing the demo model, once")
        self._done, self._total = done, total

    def _amount(self) -> str:
        return f"{size(self._done)} of {size(self._total)}" if self._total else ""
