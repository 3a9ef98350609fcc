"""Who serves which blocks of one model, kept fresh in the background.

The directory reads the records of all blocks from the DHT, pings the servers, and leaves out those
that are avoided (see `health`). Where it finds nobody for a block (the answer may be lost, or
drowned in rubbish), it asks the peers that it knows what they serve. A peer that announces nothing
for long is forgotten (see `recent`). Readers in other threads see immutable snapshots.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarm_notebook.checkpoint.files.digest import matches
from swarm_notebook.client.audit.interface import Audits
from swarm_notebook.client.servers import routing
from swarm_notebook.client.servers.announced import Announced
from swarm_notebook.client.servers.asking import (
    MAX_ASKED,
    PING_ERRORS,
    PING_TIMEOUT,
    ask,
    said,
    try_ask,
)
from swarm_notebook.client.servers.bits import BitsInUse
from swarm_notebook.client.servers.crowd import Crowd
from swarm_notebook.client.servers.detector import HELD_UP, MOST_WAITS, FailureDetector
from swarm_notebook.client.servers.health import OTHER, UNREACHABLE, Fault, PeerHealth
from swarm_notebook.client.servers.kept import KeptChain
from swarm_notebook.client.servers.recent import RecentServers
from swarm_notebook.client.servers.snapshot import Shortage, Snapshot
from swarm_notebook.client.telemetry import Telemetry
from swarm_notebook.errors import MissingBlocks, NotAMember, RemoteError, ServerGone
from swarm_notebook.net.dht.records import ServerSpan, ServerState, spans_of
from swarm_notebook.net.node import Node, smoothed_rtt
from swarm_notebook.net.wire import protocol, tensors

logger: logging.Logger = logging.getLogger(__name__)

# A reading costs one DHT search per block. Servers announce themselves every minute; ten seconds
# show a new one soon enough, and one second is for a user who waits for it.
REFRESH_PERIOD = 10.0
REFRESH_PERIOD_MISSING = 1.0
# How long a call waits for servers: a server of ours restarts in 10 to 30 s.
PATIENCE = 30.0
# How long the first reading may take in any case: a DHT search gives up on a silent peer after 3 s.
FIRST_READING = 4.0
# Why a server has blocks and nobody is to ask for them, by what it has announced last.
_AWAY = {ServerState.OFFLINE: "has left", ServerState.JOINING: "is just joining"}


@dataclass
class Directory:
    """Servers of the model `prefix` with `num_blocks` blocks, as seen by `node`.

    Attributes:
        patience: seconds to wait for a server when some blocks have none.
        rtt: measured round trip in seconds by peer.
        heard: when a peer last answered anything, in seconds of Unix time.
        snapshot: what the last reading found.
        uploaded: which version of an adapter, for which blocks, a peer got, by peer and adapter.
        upload_locks: one upload at a time, by peer.
        telemetry: takes reports of steps and failovers.
        compression: of hidden states on the wire, as the user wants it.
        health: who is avoided, and who is kept apart from whom.
        began: when this was made, by `time.monotonic`.
        home: blocks that the notebook runs itself, and needs no server for.
        digest: of the notebook's own checkpoint; servers that announce another one are avoided.
        min_bits: servers with fewer bits per weight are not used.
        audits: takes note of finished work; None: nothing is audited.
        recent: who had which blocks lately.
        shortages: what calls wait for just now.
        refused: what a private swarm has said last to this notebook, if it is no member.
        bits: per weight of the blocks that are computed.
        own_peer: this notebook's peer id.
        crowd: how busy servers are for others.
        kept: the servers that are used for single tokens.
        detector: whether servers are there.
    """

    node: Node
    prefix: str
    num_blocks: int
    patience: float = PATIENCE
    rtt: dict[str, float] = field(default_factory=dict)
    heard: dict[str, float] = field(default_factory=dict)
    snapshot: Snapshot = field(default_factory=Snapshot)
    uploaded: dict[tuple[str, str], tuple[int, int, int]] = field(default_factory=dict)
    upload_locks: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    telemetry: Telemetry = field(default_factory=Telemetry)
    compression: int = tensors.NONE
    health: PeerHealth = field(default_factory=PeerHealth)
    began: float = field(default_factory=time.monotonic)
    home: frozenset[int] = frozenset()
    digest: str | None = None
    _warned: set[str] = field(default_factory=set)
    min_bits: float = 0.0
    audits: Audits | None = None
    recent: RecentServers = field(default_factory=RecentServers)
    shortages: list[Shortage] = field(default_factory=list)
    refused: list[NotAMember] = field(default_factory=list)
    bits: BitsInUse = field(default_factory=BitsInUse)
    own_peer: str = field(init=False)
    crowd: Crowd = field(init=False)
    kept: KeptChain = field(init=False)
    detector: FailureDetector = field(init=False)
    _announced: Announced = field(init=False)
    _asked: dict[str, float] = field(default_factory=dict)
    _next_reading: float = 0.0
    _refreshing: asyncio.Task | None = None
    _background: asyncio.Task | None = None
    _asking: asyncio.Task | None = None

    def __post_init__(self) -> None:
        membership = self.node.membership if self.node is not None else None
        self._announced = Announced(self.prefix, membership)
        self.own_peer = "" if self.node is None else self.node.peer_id.to_base58()
        self.crowd = Crowd(self.own_peer)
        self.kept = KeptChain(self.crowd, self._is_strange)
        self.detector = FailureDetector(self.ping)

    async def start(self) -> None:
        """Read the records once, then keep reading them in the background."""
        # Peers that are silent hold up a reading, which goes on by itself.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(self.patience, FIRST_READING)):
                await self.refresh()
                if not self.snapshot.spans:
                    await self.node.redial()
                    await self.refresh()
        self._background = asyncio.create_task(self._keep_fresh())
        self._asking = asyncio.create_task(self.detector.keep_asking(self._missed))

    async def stop(self) -> None:
        for task in (self._background, self._refreshing, self._asking):
            if task is not None:
                task.cancel()
        self.detector.stop()

    async def _keep_fresh(self) -> None:
        while True:
            missing = bool(self.missing())
            pause = REFRESH_PERIOD_MISSING if missing else REFRESH_PERIOD
            self._next_reading = time.monotonic() + pause
            await asyncio.sleep(pause)
            try:
                if missing:
                    await self.node.redial(self.heard)
                await self.refresh()
            except Exception:
                logger.exception("reading the records of %s failed; trying again", self.prefix)

    async def refresh(self) -> None:
        """Read all records now; calls while a reading is under way share it."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        await self.node.learn_revocations()
        uids = [protocol.block_uid(self.prefix, index) for index in range(self.num_blocks)]
        found = await self.node.dht.get_many(uids, sufficient_expiration_time=float("inf"))
        when = time.time()
        by_block = {index: found.get(uid) for index, uid in enumerate(uids)}
        await asyncio.to_thread(self._announced.check, by_block)
        for index, value in by_block.items():
            self._announced.update(index, value, when)
        self._show(when)
        spans = self.snapshot.spans
        self.note(spans, time.monotonic())
        online = {span.peer for span in spans if span.info.state == ServerState.ONLINE}
        await asyncio.gather(*(self.ping(peer) for peer in online | self._announced.doubtful()))
        self._show(when)
        if self.missing():
            await self._ask_neighbours()
            self._show(when)

    def _show(self, when: float) -> None:
        """Let everybody see what is known now."""
        spans = tuple(spans_of(self._announced.holders()))
        self.snapshot = Snapshot(spans, when, self._announced.times(), self._others(spans))

    async def _ask_neighbours(self) -> None:
        """Ask peers of which nothing was read whether they serve blocks of this model."""
        now = time.monotonic()
        self._asked = {peer: at for peer, at in self._asked.items() if now - at < REFRESH_PERIOD}
        known = {span.peer for span in self.snapshot.spans} | self._asked.keys()
        peers = [peer for peer in self.node.neighbours() if peer not in known][:MAX_ASKED]
        self._asked |= dict.fromkeys(peers, now)
        answers = await asyncio.gather(*map(self.try_info, peers))
        for peer, answer in zip(peers, answers, strict=True):
            if answer is not None:
                self._announced.told(peer, answer, self.num_blocks)

    async def ping(self, peer: str, seconds: float = PING_TIMEOUT, waits: int = MOST_WAITS) -> bool:
        """Ask for a sign of life within so many seconds; the round trip goes into `rtt`.

        Args:
            waits: how often at most, if this process was held up meanwhile.
        """
        began = time.perf_counter()
        try:
            async with asyncio.timeout(seconds):
                info = await self.info(peer)
        except PING_ERRORS as error:
            late = time.perf_counter() - began - seconds
            if isinstance(error, TimeoutError) and late > HELD_UP and waits > 1:
                return await self.ping(peer, seconds, waits - 1)
            logger.debug("ping of %s: %s", peer, error)
            if isinstance(error, NotAMember):
                self.refused[:] = [error]
            self.health.silent(peer, said(error))
            return False
        self.heard[peer] = time.time()
        self.refused.clear()
        self.health.answered(peer)
        self._announced.told(peer, info, self.num_blocks)
        seconds = time.perf_counter() - began
        self.rtt[peer] = smoothed_rtt(self.rtt.get(peer), seconds)
        self.detector.answered(peer, seconds)
        here = self.telemetry.usage.requests(peer)
        self.crowd.told(peer, info.get("requests_served"), here, time.monotonic())
        self.crowd.arrived(peer, info.get("arrival"))
        return True

    def note(self, spans: Sequence[ServerSpan], now: float) -> None:
        """Remember who was announced with what, and forget who was not for long."""
        self.recent.note(spans, now)
        for peer in self.recent.silent(now):
            lock = self.upload_locks.get(peer)
            if not (lock and lock.locked()):
                self._forget(peer)

    def _forget(self, peer: str) -> None:
        self.recent.forget(peer)
        for known in (self.rtt, self.heard, self.upload_locks):
            known.pop(peer, None)
        for key in [key for key in self.uploaded if key[0] == peer]:
            del self.uploaded[key]
        self.health.forget(peer)
        self.crowd.forget(peer)
        self.detector.forget(peer)

    async def info(self, peer: str) -> dict[str, Any]:
        """The server's answer to rpc_info; room in the cache of ours is in tokens."""
        return await ask(self.node, peer)

    async def try_info(self, peer: str) -> dict[str, Any] | None:
        """`info`, or None if no readable answer comes within `PING_TIMEOUT`."""
        refused: list[NotAMember] = []
        found = await try_ask(self.node, peer, refused)
        if refused:
            self.refused[:] = refused
        return found

    def _missed(self) -> list[str]:
        """Peers that were heard before and are not now."""
        faults = [(one.peer, self.fault(one.peer)) for one in self.snapshot.spans]
        missed = [peer for peer, fault in faults if fault and fault.kind == UNREACHABLE]
        return [peer for peer in missed if peer in self.heard]

    def replaceable(self, peer: str) -> bool:
        """Whether others have all of the blocks that a peer serves."""
        spans = [span for span in self.snapshot.spans if span.peer == peer]
        return not any(self.missing_within(span.start, span.end, {peer}) for span in spans)

    def is_left(self, peer: str) -> bool:
        """Whether a peer is avoided, and others have its blocks."""
        return bool(self.avoided(peer)) and self.replaceable(peer)

    def missing(self) -> list[int]:
        """Blocks that are needed and that no server holds which is online and not avoided."""
        missing = self.missing_within(0, self.num_blocks)
        return [block for block in missing if block not in self.home]

    def missing_within(self, start: int, end: int, exclude: Collection[str] = ()) -> list[int]:
        """As `missing`, of these blocks, without some peers, and those at home, too."""
        usable = [span for span in self.usable() if span.peer not in exclude]
        online = [span for span in usable if span.info.state == ServerState.ONLINE]
        return routing.uncovered(online, start, end)

    def usable(self) -> list[ServerSpan]:
        """The announced spans without those of peers that are avoided, or too coarse."""
        fine = [span for span in self.snapshot.spans if span.weight_bits >= self.min_bits]
        return [span for span in fine if not self.avoided(span.peer)]

    @property
    def links(self) -> routing.Links:
        """How far notebook and servers are from each other."""
        return routing.Links(self.rtt, self.together)

    def _is_strange(self, span: ServerSpan) -> bool:
        return self.audits is not None and not self.audits.outcomes(span.peer).agreed

    def chain(
        self,
        start: int,
        end: int,
        exclude: Collection[str] = (),
        work: routing.Work = routing.ONE_TOKEN,
    ) -> list[routing.RouteSegment]:
        """The best chain, kept to unless servers are excluded; MissingBlocks names who had some."""
        usable, links = self.usable(), self.links
        with self._saying_who_had(start, end):
            usual = None if exclude else self.kept.choose(usable, start, end, links)
            return routing.best_chain(usable, start, end, links, exclude, work=work, usual=usual)

    def begins_at(self, block: int) -> bool:
        """Whether this is the first block that is not at home: there a pass enters the swarm."""
        return self.home.issuperset(range(block))

    def route(self, home: frozenset[int] | None = None) -> list[routing.RouteSegment]:
        """What `chain` would give for all blocks not at ``home`` (None: as now); keeps nothing."""
        usable, links, found = self.usable(), self.links, list[routing.RouteSegment]()
        for start, end in routing.stretches(self.num_blocks, self.home if home is None else home):
            with self._saying_who_had(start, end):
                found += self.kept.expected(usable, start, end, links)
        return found

    @contextlib.contextmanager
    def _saying_who_had(self, start: int, end: int) -> Iterator[None]:
        try:
            yield
        except MissingBlocks as error:
            raise MissingBlocks(f"{error} of {self.prefix}{self.who_had(start, end)}") from None

    def who_had(self, start: int, end: int) -> str:
        """Who has blocks of ``[start, end)`` that nobody can be asked for, and why not, in words.

        Empty if nobody is known, else what goes on behind a message.
        """
        names = self.recent.holders(self.missing_within(start, end))
        reasons = [f"; until now {', '.join(names)} had them"] if names else []
        spans = [one for one in self.snapshot.spans if one.start < end and start < one.end]
        reasons += [
            f"; {span.name} has {span.weight_bits:.3g} bits, but min_bits is {self.min_bits:g}"
            for span in spans
            if span.weight_bits < self.min_bits
        ]
        reasons += [
            f"; {span.name} {_AWAY[state]}" for span in spans if (state := span.info.state) in _AWAY
        ]
        reasons += [
            f"; {span.name} is not used ({fault.kind}): {fault.reason}"
            for span in spans
            if (fault := self.fault(span.peer))
        ]
        return "".join(reasons)

    def failed(self, peer: str, error: RemoteError) -> None:
        """Avoid a peer from now on, for longer each time it fails again."""
        self.health.failed(peer, str(error), gone=isinstance(error, ServerGone))

    def succeeded(self, peer: str) -> None:
        """A peer has answered a request: its failures before are forgotten."""
        self.heard[peer] = time.time()
        self.health.succeeded(peer)

    def compression_for(self, span: ServerSpan) -> int:
        """The compression of hidden states to and from a server, of those that it can read."""
        wanted = self.compression
        return tensors.NONE if wanted == tensors.INT8 and not span.takes_bytes else wanted

    def together(self, sender: ServerSpan, receiver: ServerSpan) -> bool:
        """Whether one of these servers can hand its output to the other, as far as is known."""
        able = sender.pushes and receiver.pushes
        return able and not self.health.kept_apart(sender.peer, receiver.peer)

    def fault(self, peer: str) -> Fault | None:
        """Why a peer is avoided just now, and when it is tried again; None if it is not."""
        other = self.snapshot.others.get(peer)
        return Fault(OTHER, other) if other else self.health.fault(peer, self._next_reading)

    def avoided(self, peer: str) -> str:
        """The reason of `fault`; an empty text if there is none."""
        fault = self.fault(peer)
        return "" if fault is None else fault.reason

    def _others(self, spans: Sequence[ServerSpan]) -> dict[str, str]:
        """Of servers with another checkpoint than the notebook's, what is to be said of it."""
        if self.digest is None:
            return {}
        found = {
            span.peer: f"it serves another checkpoint (digest {span.info.digest}) than this "
            f"notebook has (digest {self.digest})"
            for span in spans
            if span.info.digest is not None and not matches(self.digest, span.info.digest)
        }
        for span in spans:
            if span.peer in found and span.peer not in self._warned:
                logger.warning("%s is not used: %s", span.name, found[span.peer])
        self._warned = set(found)
        return found
