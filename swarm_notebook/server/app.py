"""One server from start to stop: take a place, load, measure, announce, serve, leave.

`process` holds one after another, and ends when it is told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from swarm_notebook.checkpoint.anatomy import context_length
from swarm_notebook.checkpoint.files.digest import digest
from swarm_notebook.checkpoint.files.source import ModelSource, resolve
from swarm_notebook.net import lan
from swarm_notebook.net.dht.records import ModelRecord, ServerInfo, ServerState
from swarm_notebook.net.membership.authority import Authority
from swarm_notebook.net.node import Node
from swarm_notebook.net.p2p import daemon
from swarm_notebook.net.wire.traffic import Traffic
from swarm_notebook.server.adapters.store import AdapterLimits
from swarm_notebook.server.engine.engine import Engine
from swarm_notebook.server.engine.kv.budget import CachePool
from swarm_notebook.server.engine.quantising.loading import check_bits
from swarm_notebook.server.engine.requests import Limits
from swarm_notebook.server.engine.scheduling.worker import ComputeThread, Job
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.startup import leave_cores_alone, prepare
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.engine.throughput import RateMeter
from swarm_notebook.server.laps import Laps
from swarm_notebook.server.loading.reading import Read, Reading
from swarm_notebook.server.loading.room import room_for
from swarm_notebook.server.memory import heap
from swarm_notebook.server.options import CACHE_TOKENS, ServeOptions
from swarm_notebook.server.presence.announce import Announcer, describe
from swarm_notebook.server.presence.arrival import (
    GOODBYE_SECONDS,
    run_beside,
    start_node,
    stay_together,
)
from swarm_notebook.server.presence.flow import Moves, Place
from swarm_notebook.server.presence.moving import Blocks, Move, common, moves_of
from swarm_notebook.server.presence.pings import NeighbourPings
from swarm_notebook.server.presence.placing import Placing
from swarm_notebook.server.presence.reunion import Reunion
from swarm_notebook.server.rpc.answers import traffic_for
from swarm_notebook.server.rpc.handler import Handler

logger: logging.Logger = logging.getLogger(__name__)

# How long steps in flight may take; where others wait for this server, as its last word may.
LEAVE_SECONDS, HURRY_SECONDS = 30.0, 1.0
# Between two checks for what has expired.
EXPIRE_SECONDS = 5.0


class Server:
    """Hosts blocks of a model in a swarm, from `start` to `stop`, in the running asyncio loop.

    Several may live in one process, each with its network daemon and its torch thread. What was
    stopped, or failed to start, does not start again.

    Args:
        options: what to serve and how; ``threads`` and ``exit_with_stdin`` are the process's.
        tell: gets facts for the program that started the server, as they come: first where it
            listens, at last ``"ready": True`` with all that is needed to use it.
        progress: also tell how much of the weights was read.
        known: where peers are, or were, that the server of before knew.
        kept: those of the blocks that this process has already.
        goal: blocks to go on to from here.

    Attributes:
        facts: what was told, but for the progress.
    """

    known: Mapping[str, Sequence[str]]

    def __init__(
        self,
        options: ServeOptions,
        tell: Callable[[dict[str, Any]], None] = lambda _: None,
        *,
        progress: bool = False,
        known: Mapping[str, Sequence[str]] = MappingProxyType({}),
        kept: Read | None = None,
        goal: Blocks | None = None,
    ):
        self._options, self._tell, self._tells_progress = options, tell, progress
        self.known, self._kept, self._goal = known, kept, goal
        self.facts: dict[str, Any] = {}
        self._stack = contextlib.AsyncExitStack()
        self._announcer: Announcer | None = None
        self._reunion: Reunion | None = None
        self._up: _Up | None = None

    async def start(self) -> None:
        """Join the swarm, load the blocks, measure them and tell everybody.

        Whatever is raised (and so a cancellation, too) leaves nothing behind.

        Raises: as `serve`.
        """
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def stop(self, *, hurry: bool = False) -> None:
        """Answer what is in flight, tell the swarm, free everything; does nothing twice."""
        leave, goodbye = (HURRY_SECONDS,) * 2 if hurry else (LEAVE_SECONDS, GOODBYE_SECONDS)
        up, self._up = self._up, None
        try:
            if up is not None and daemon.lives(up.node.p2p):
                logger.info("leaving: finishing what is in flight")
                await up.handler.leave(leave)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(goodbye):
                        await up.announcer.stop(up.describe(ServerState.OFFLINE))
                logger.info("left the swarm")
        finally:
            await self._stack.aclose()

    @property
    def options(self) -> ServeOptions:
        """What it serves and how; once it has started, nothing of it is open."""
        return self._options

    @property
    def _moves(self) -> Moves:
        """How others have to reckon with it; who is on its way goes nowhere else."""
        return moves_of(self._options) if self._goal is None else Moves.NEVER

    @property
    def busy(self) -> bool:
        """Whether a step of a session is in flight."""
        return self._up is not None and self._up.handler.busy

    @property
    def up(self) -> bool:
        """Whether it serves."""
        return self._up is not None

    async def better_place(self) -> Move:
        """Return as soon as it had better serve other blocks, if it may choose them."""
        up = self._up
        while up is None or not self._options.chosen:
            await asyncio.Event().wait()  # for ever
        start, end = self.facts["blocks"]

        def own() -> Place:
            info = up.describe(ServerState.ONLINE)
            return Place.announced(start, end, info.throughput, Moves(info.moves or Moves.AWAY))

        goal, whole = self._goal, True
        if goal is None:
            there, whole = await up.placing.better(own)
            goal = there.start, there.end
            logger.info("moving to blocks %d:%d, where the swarm needs this server more", *goal)
        stop = common((start, end), goal) if moves_of(self._options) is Moves.BESIDE else None
        beside = whole and stop is not None
        peers = [*(self.facts["maddrs"] if beside else ()), *await up.node.known_addresses()]
        # Those that it was told at first may have gone, and nobody may have told it of any.
        peers = [*dict.fromkeys([*peers, *self._options.initial_peers])]
        # To be let in takes as long as the slowest of them.
        peers = [one for one in peers if one.rpartition("/")[2] not in up.placing.silent] or peers
        known = self.known if self._reunion is None else self._reunion.remembered
        options = replace(self._options, blocks=goal, chosen=True, initial_peers=peers)
        if stop is None:
            return Move(options, known, hurry=not whole)
        kept = await up.compute.submit(up.read.part, *stop).future
        if stop == (start, end) or not beside:
            return Move(options, known, kept, beside, hurry=not whole)
        return Move(replace(options, blocks=stop), known, kept, beside, goal)

    async def replaced(self) -> None:
        """Return as soon as each of its blocks has another server."""
        if self._up is not None:
            await self._up.placing.replaced(*self.facts["blocks"])

    async def daemon_ended(self) -> None:
        """Return when the network daemon has ended."""
        if self._up is not None:
            await daemon.ended(self._up.node.p2p)

    async def trim(self) -> None:
        """Give memory that nobody needs back to the system, whenever nobody is there.

        For a server with a process of its own; runs until it is cancelled.
        """
        while self._up is not None:
            served = self._up.handler.requests_served
            await asyncio.sleep(EXPIRE_SECONDS)
            if self._up is not None and self._up.handler.requests_served == served:
                # Nobody is there whose step would have to wait for it.
                gc.collect()
                await self._up.compute.submit(heap.trim).future

    async def _start(self) -> None:
        laps = Laps()
        source = resolve(self._options.model, dummy=self._options.dummy_weights)
        options = self._options = await self._settled(source)
        compute = ComputeThread()
        # Python that ends while torch is at work in another thread aborts the process.
        self._stack.push_async_callback(asyncio.to_thread, compute.stop)
        node, placing, loading = await self._take_place(compute, source)
        options = self._options
        self._say(peer_id=node.peer_id.to_base58(), maddrs=await node.addresses(), pid=os.getpid())
        config = source.config()
        blocks = options.blocks or (0, config.num_hidden_layers)
        model = ModelRecord(num_blocks=config.num_hidden_layers, repository=source.repository)
        announcer = Announcer(node, source.dht_prefix, blocks, model, options.update_period)
        self._stack.push_async_callback(announcer.cancel)
        self._announcer = announcer
        told = await asyncio.to_thread(digest, source)
        joining = describe(blocks, options, told, None, ServerState.JOINING, moves=self._moves)
        await announcer.announce(joining)
        self._say(blocks=list(blocks))
        read = await laps.of("for the weights", announcer.beside(loading.future, joining))
        span = Span(read.blocks.decoder, read.blocks.layers_name, read.blocks.start)
        tokens = options.cache_tokens or CACHE_TOKENS
        preparing = self._prepare(compute, span, config.hidden_size, tokens)
        about = partial(describe, blocks, options, told, read.quantised)
        pings = NeighbourPings(node, source.dht_prefix, blocks, told)
        await pings.measure()
        batching, rates = await laps.of("to try the blocks", preparing.future)
        if span.device.type == "cuda" and options.threads is None:
            leave_cores_alone()
        meter = RateMeter(rates)
        compute.on_ran = meter.ran
        limits = Limits(
            prefix=source.dht_prefix,
            start=span.start,
            end=span.end,
            hidden_size=config.hidden_size,
            context=context_length(config),
            tokens=tokens,
        )
        pool = CachePool(limits.tokens)
        accepted = AdapterLimits(bytes=options.adapter_bytes)
        engine = Engine(span, options.activation_bytes, accepted, batching)
        traffic = Traffic(options.traffic_bytes or traffic_for(limits))
        handler = Handler(
            span,
            limits,
            pool,
            compute,
            engine,
            traffic=traffic,
            announced=lambda: announcer.latest,
            membership=node.membership,
        )
        self._stack.push_async_callback(handler.close)
        run_beside(self._stack, _keep_expiring(handler))
        run_beside(self._stack, _tell_engine(batching, announcer))
        await handler.register(node.p2p, node.identity)

        def now(state: ServerState) -> ServerInfo:
            return about(
                state,
                rates=meter.rates,
                engine=batching.engine,
                pool=pool,
                pings=pings.rtt,
                moves=self._moves,
            )

        async def online() -> ServerInfo:
            await pings.measure()
            return now(ServerState.ONLINE)

        await announcer.announce(now(ServerState.ONLINE))
        announcer.keep(online)
        self._up = _Up(node, compute, handler, announcer, now, placing, read)
        self._say(ready=True, model=source.name)
        await self._tell_invitation()
        logger.info(
            "serving blocks %d:%d of %s: %.0f tokens/s through a block in steps, %.0f in passes; "
            "ready after %s",
            *blocks,
            source.name,
            meter.rates.inference_rps,
            meter.rates.forward_rps,
            laps,
        )

    async def _settled(self, source: ModelSource) -> ServeOptions:
        """The options, nothing left open but the blocks and the dtype."""
        options = self._options.with_device()
        if options.bits is not None:
            check_bits(options.bits)
        if options.lan:
            folder = options.swarm
            key = None if folder is None else (await asyncio.to_thread(Authority, folder)).swarm
            found = await lan.peers(source.dht_prefix, options.initial_peers, key)
            options = replace(options, initial_peers=[*options.initial_peers, *found])
        return options

    async def _tell_invitation(self) -> None:
        """Print what to hand on, where a person reads it."""
        if self._options.swarm is not None and not self._options.exit_with_stdin:
            invitation = await asyncio.to_thread(Authority(self._options.swarm).invite)
            self._say(invitation=str(invitation))
            logger.info("one notebook may join with: %%swarm connect %s", invitation)

    def _say(self, **facts: Any) -> None:
        self.facts.update(facts)
        self._tell(dict(self.facts))

    async def _take_place(
        self, compute: ComputeThread, source: ModelSource
    ) -> tuple[Node, Placing, Job]:
        """Join the swarm, and begin to read the blocks: at once where it is known which."""
        options = self._options
        joins = options.blocks is None and (options.initial_peers or options.chosen)
        chooses = options.memory is not None or joins
        loading = None
        if self._kept is not None or not chooses:
            # It and joining take seconds, and one mostly waits.
            dtype = options.computes_in(source, packed=options.bits is not None)
            self._options = replace(options, dtype=dtype)
            loading = self._begin_loading(compute, source)
        node = await start_node(options, self._stack, source.shared_name)
        self._reunion = await stay_together(
            options, self._stack, node, source.dht_prefix, self._announce_soon, known=self.known
        )
        blocks = source.config().num_hidden_layers
        placing = Placing(node, source.dht_prefix, blocks)
        if loading is None:
            measuring = compute.submit(room_for, source, options)
            self._stack.callback(measuring.cancel)
            room = await measuring.future
            if (span := options.blocks) is None:
                span = await placing.choose(room.blocks)
                logger.info("serving blocks %d:%d of %d: the swarm needs them most", *span, blocks)
            chosen = options.chosen or options.blocks is None
            self._options = replace(
                options, blocks=span, chosen=chosen, bits=room.bits, dtype=room.dtype
            )
            loading = self._begin_loading(compute, source)
        return node, placing, loading

    def _announce_soon(self) -> None:
        if self._announcer is not None:  # it announces by itself when it has loaded
            self._announcer.soon()

    def _begin_loading(self, compute: ComputeThread, source: ModelSource) -> Job:
        tell = self._tell if self._tells_progress else None
        reading, self._kept = Reading(source, self._options, tell, self._kept), None
        loading = compute.submit(reading.run)
        self._stack.callback(loading.cancel)
        self._stack.callback(reading.give_up)
        return loading

    def _prepare(self, compute: ComputeThread, span: Span, hidden_size: int, tokens: int) -> Job:
        loop = asyncio.get_running_loop()

        def later(call: Callable[[], None]) -> None:
            loop.call_soon_threadsafe(compute.submit, call)

        prepared = partial(prepare, reproducible=self._options.reproducible)
        return compute.submit(prepared, span, hidden_size, tokens, self._options.threads, later)


@dataclass(frozen=True)
class _Up:
    """The parts of a server that has started."""

    node: Node
    compute: ComputeThread
    handler: Handler
    announcer: Announcer
    describe: Callable[[ServerState], ServerInfo]
    placing: Placing
    read: Read


async def _tell_engine(batching: Batching, announcer: Announcer) -> None:
    """Announce at once that steps run in another way: compiled blocks took over, or failed."""
    told = batching.engine
    while True:
        await asyncio.sleep(EXPIRE_SECONDS)
        if batching.engine != told:
            told = batching.engine
            logger.info("steps run in another way now: %s", told)
            announcer.soon()


async def _keep_expiring(handler: Handler) -> None:
    while True:
        await asyncio.sleep(EXPIRE_SECONDS)
        try:
            await handler.expire()
        except Exception:
            logger.exception("letting go of what is old failed; trying again")
