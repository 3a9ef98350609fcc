"""A server from start to exit: load, measure, announce, serve, leave.

The process begins as a fresh interpreter (``swarm-notebook serve``), never as a fork. Standard
output carries JSON lines for programs: first where the server listens, at last ``"ready": true``
with all that is needed to use it. People read the log on standard error.

SIGTERM, SIGINT and, with ``exit_with_stdin``, the end of standard input make it leave: steps in
flight are answered, the swarm is told, the exit code is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from hivemind.p2p import P2PDaemonError

from swarm_notebook import __version__
from swarm_notebook.checkpoint.anatomy import context_length
from swarm_notebook.checkpoint.digest import digest
from swarm_notebook.checkpoint.partial import LoadedBlocks
from swarm_notebook.checkpoint.source import ModelSource, resolve
from swarm_notebook.errors import ConnectionFailed, NotAMember, ServerFailed
from swarm_notebook.net import protocol, tensors
from swarm_notebook.net.membership.authority import Authority
from swarm_notebook.net.membership.certificate import Role
from swarm_notebook.net.membership.joining import offer
from swarm_notebook.net.node import Node
from swarm_notebook.net.records import ModelRecord, ServerInfo, ServerState, to_petals_tokens
from swarm_notebook.net.traffic import Traffic
from swarm_notebook.server import heap, lifetime
from swarm_notebook.server.adapters.store import AdapterLimits
from swarm_notebook.server.announce import Announcer
from swarm_notebook.server.engine import throughput
from swarm_notebook.server.engine.engine import Engine
from swarm_notebook.server.engine.kv.budget import CachePool
from swarm_notebook.server.engine.products import few_bits, kernels
from swarm_notebook.server.engine.quantising.loading import (
    Quantised,
    check_bits,
    load_within,
)
from swarm_notebook.server.engine.requests import Limits
from swarm_notebook.server.engine.scheduling.worker import ComputeThread, Job
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.membership import MembershipKeeper
from swarm_notebook.server.options import CACHE_TOKENS, ServeOptions
from swarm_notebook.server.pings import NeighbourPings
from swarm_notebook.server.places import Place
from swarm_notebook.server.placing import Placing, room_for
from swarm_notebook.server.rpc.answers import traffic_for
from swarm_notebook.server.rpc.handler import Handler

logger = logging.getLogger(__name__)

# How long steps in flight may take, and then the record that says offline and the end of p2pd.
LEAVE_SECONDS = 30.0
GOODBYE_SECONDS = 5.0
# Between two lines of the log, and two of a progress bar.
PROGRESS_SECONDS = 2.0
TELL_SECONDS = 0.25
# Between two checks for what has expired.
EXPIRE_SECONDS = 5.0
# Weights with more bits than this have 8 for the most part.
INT8_BITS = 6.5


def main(options: ServeOptions) -> NoReturn:
    """Serve until told to leave, then end the process with exit code 0."""
    # PEFT warns of configs. They are the notebook's, whose own PEFT has warned there.
    warnings.filterwarnings("ignore", module=r"peft\.tuners\.")
    # It plans anew for every length of a context: 60 ms per token instead of 15 on an H100.
    torch.backends.cuda.enable_cudnn_sdp(False)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    with asyncio.Runner(loop_factory=lifetime.server_loop) as runner:
        runner.run(serve(options))
    logging.shutdown()
    # All is done and said; taking torch apart in good order would take seconds.
    os._exit(0)


async def serve(options: ServeOptions) -> None:
    """Host blocks until a signal (or the end of standard input) says to leave.

    Raises:
        ModelNotFound, BlocksOutOfRange, Unsupported: there is nothing to serve.
        AddressError, ConnectionFailed: the swarm cannot be joined.
        ServerFailed: the network daemon died.
    """
    leaving = asyncio.create_task(lifetime.leaving(options.exit_with_stdin).wait())
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    while not leaving.done():
        # A notebook shows how far it is; a person who reads the terminal has the log.
        server = Server(options, _tell, progress=options.exit_with_stdin)
        try:
            await _serve_in_place(server, leaving)
        except ConnectionFailed as error:
            if not options.chosen:
                raise
            logger.warning("%s; trying again", error)
            await asyncio.wait([leaving], timeout=GOODBYE_SECONDS)
        # Where it moves to it begins anew, and needs the memory of what it had.
        options = server.moved
        del server
        gc.unfreeze()
        gc.collect()


async def _serve_in_place(server: Server, leaving: asyncio.Task[Any]) -> None:
    """Serve until told to leave, or until another place is better.

    Raises: as `serve`.
    """
    starting = asyncio.create_task(server.start())
    await asyncio.wait([starting, leaving], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        logger.info("leaving before the server was ready")
        starting.cancel()
        # What takes longer ends with the process.
        await asyncio.wait([starting], timeout=GOODBYE_SECONDS)
        return
    try:
        starting.result()
    except P2PDaemonError as error:
        raise ConnectionFailed(
            f"the network daemon cannot listen on {', '.join(server.moved.host_maddrs)}; is the "
            f"port taken? Choose another one with --host-maddrs ({error})"
        ) from None
    heap.freeze()
    trimming = asyncio.create_task(server.trim())
    ended = asyncio.create_task(server.daemon_ended())
    moving = asyncio.create_task(server.better_place())
    await asyncio.wait([ended, leaving, moving], return_when=asyncio.FIRST_COMPLETED)
    failed = ended.done()
    for task in (trimming, ended, moving):
        task.cancel()
    await server.stop()
    if failed:
        raise ServerFailed("the network daemon (p2pd) of this server has died")


class _GivenUp(Exception):
    """The server ends before it has its blocks."""


class Server:
    """Hosts blocks of a model in a swarm, from `start` to `stop`, in the running asyncio loop.

    Several may live in one process, each with its network daemon and its torch thread. What was
    stopped, or failed to start, does not start again.

    Args:
        options: what to serve and how; ``threads`` and ``exit_with_stdin`` are the process's.
        tell: gets facts for the program that started the server, as they come: first where it
            listens, at last ``"ready": True`` with all that is needed to use it.
        progress: also tell how much of the weights was read.

    Attributes:
        facts: what was told, but for the progress.
        moved: with what it would start again, in the place that it has found better.
    """

    def __init__(
        self,
        options: ServeOptions,
        tell: Callable[[dict[str, Any]], None] = lambda _: None,
        *,
        progress: bool = False,
    ):
        self._options, self._tell, self._tells_progress = options, tell, progress
        self.facts: dict[str, Any] = {}
        self.moved = options
        self._stack = contextlib.AsyncExitStack()
        self._given_up = threading.Event()
        self._up: _Up | None = None
        self._quantised: Quantised | None = None

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

    async def stop(self) -> None:
        """Answer what is in flight, tell the swarm, free everything; does nothing twice."""
        up, self._up = self._up, None
        try:
            if up is not None and lifetime.daemon_lives(up.node.p2p):
                logger.info("leaving: finishing what is in flight")
                await up.handler.leave(LEAVE_SECONDS)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GOODBYE_SECONDS):
                        await up.announcer.stop(up.describe(ServerState.OFFLINE))
                logger.info("left the swarm")
        finally:
            await self._stack.aclose()

    @property
    def busy(self) -> bool:
        """Whether a step of a session is in flight."""
        return self._up is not None and self._up.handler.busy

    async def better_place(self) -> None:
        """Return when it had better serve other blocks (see `moved`), if it may choose them."""
        up = self._up
        if up is None or not self._options.chosen:
            await asyncio.Event().wait()
            return
        (start, end), rate = self.facts["blocks"], up.describe(ServerState.ONLINE).throughput
        span = await up.placing.better(Place(start, end, rate))
        logger.info("moving to blocks %d:%d, where the swarm needs this server more", *span)
        self.moved = replace(self._options, blocks=span, chosen=True)

    async def daemon_ended(self) -> None:
        """Return when the network daemon has ended."""
        if self._up is not None:
            await lifetime.daemon_ended(self._up.node.p2p)

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
        source = resolve(self._options.model, dummy=self._options.dummy_weights)
        options = self._options = self._options.settled(source)
        if options.bits is not None:
            check_bits(options.bits)
        compute = ComputeThread()
        self._stack.push_async_callback(self._end_thread, compute)
        node, placing, loading = await self._take_place(compute, source)
        options = self._options
        self._say(peer_id=node.peer_id.to_base58(), maddrs=await node.addresses(), pid=os.getpid())
        loaded: LoadedBlocks = await loading.future
        config, blocks = source.config(), (loaded.start, loaded.end)
        span = Span(loaded.decoder, loaded.layers_name, loaded.start)
        tokens = options.cache_tokens or CACHE_TOKENS
        measuring = self._measuring(compute, span, config.hidden_size, tokens)
        model = ModelRecord(num_blocks=config.num_hidden_layers, repository=source.repository)
        announcer = Announcer(node, source.dht_prefix, blocks, model, options.update_period)
        self._stack.push_async_callback(announcer.cancel)
        told = await asyncio.to_thread(digest, source)
        joining = _info(ServerState.JOINING, blocks, options, told=told)
        await announcer.announce(_told_bits(joining, self._quantised))
        pings = NeighbourPings(node, source.dht_prefix, blocks, told)
        await pings.measure()
        batching, rates = await measuring.future
        if span.device.type == "cuda" and options.threads is None:
            _leave_cores_alone()
        meter = throughput.RateMeter(rates)
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
        expiring = asyncio.create_task(_keep_expiring(handler))
        self._stack.push_async_callback(_end_task, expiring)
        await handler.register(node.p2p)

        def describe(state: ServerState) -> ServerInfo:
            found = _info(state, blocks, options, meter.rates, pool, told=told, pings=pings.rtt)
            return _told_bits(found, self._quantised)

        async def describe_again() -> ServerInfo:
            await pings.measure()
            return describe(ServerState.ONLINE)

        await announcer.announce(describe(ServerState.ONLINE))
        announcer.keep(describe_again)
        self._up = _Up(node, compute, handler, announcer, describe, placing)
        self._say(ready=True, blocks=list(blocks), model=source.name)
        await self._tell_invitation()
        logger.info(
            "serving blocks %d:%d of %s: %.0f tokens/s through a block in steps, %.0f in passes",
            *blocks,
            source.name,
            meter.rates.inference_rps,
            meter.rates.forward_rps,
        )

    async def _tell_invitation(self) -> None:
        """Print what to hand on, where a person reads it."""
        if self._options.swarm is not None and not self._options.exit_with_stdin:
            invitation = await asyncio.to_thread(Authority(self._options.swarm).invite)
            self._say(invitation=str(invitation))
            logger.info("one notebook may join with: %%swarm connect %s", invitation)

    def _say(self, **facts: Any) -> None:
        self.facts.update(facts)
        self._tell(dict(self.facts))

    async def _end_thread(self, compute: ComputeThread) -> None:
        # Python that ends while torch is at work in another thread aborts the process.
        self._given_up.set()
        await asyncio.to_thread(compute.stop)

    async def _take_place(
        self, compute: ComputeThread, source: ModelSource
    ) -> tuple[Node, Placing, Job]:
        """Join the swarm, and begin to read the blocks: at once where it is known which."""
        options = self._options
        chooses = options.blocks is None and (options.initial_peers or options.memory is not None)
        # Both take seconds, and one mostly waits.
        loading = None if chooses else self._begin_loading(compute, source)
        node = await self._start_node(source.shared_name)
        blocks = source.config().num_hidden_layers
        placing = Placing(node, source.dht_prefix, blocks)
        if loading is None:
            size = await asyncio.to_thread(room_for, source, options)
            span = await placing.choose(size)
            logger.info("serving blocks %d:%d of %d: the swarm needs them most", *span, blocks)
            self._options = replace(options, blocks=span, chosen=True)
            loading = self._begin_loading(compute, source)
        return node, placing, loading

    def _begin_loading(self, compute: ComputeThread, source: ModelSource) -> Job:
        loading = compute.submit(self._load, source)
        self._stack.callback(loading.cancel)
        return loading

    async def _start_node(self, shared_name: str) -> Node:
        options = self._options
        swarm = options.swarm
        authority = None if swarm is None else await asyncio.to_thread(Authority, swarm)
        starting = asyncio.create_task(
            Node.start(
                options.initial_peers,
                client=False,
                host_maddrs=options.host_maddrs,
                identity=options.identity,
                credentials=None if authority is None else authority.owner(),
            )
        )
        # Shielded: hivemind would leave the daemon behind that it is just starting.
        self._stack.push_async_callback(_stop_node, starting)
        node = await asyncio.shield(starting)
        if node.membership is not None:
            await self._take_part(node, authority, shared_name)
        return node

    async def _take_part(self, node: Node, authority: Authority | None, shared_name: str) -> None:
        """Do what servers of a private swarm do besides serving."""
        _check_role(node)
        if authority is not None:
            await offer(node.p2p, authority)
        keeper = MembershipKeeper(node, authority, await node.addresses(), shared_name)
        self._stack.push_async_callback(keeper.stop)
        await keeper.update()
        keeping = asyncio.create_task(keeper.run())
        self._stack.push_async_callback(_end_task, keeping)

    def _measuring(self, compute: ComputeThread, span: Span, hidden_size: int, tokens: int) -> Job:
        loop = asyncio.get_running_loop()

        def later(call: Callable[[], None]) -> None:
            loop.call_soon_threadsafe(compute.submit, call)

        threads = self._options.threads
        return compute.submit(_measure, span, hidden_size, tokens, threads, later)

    def _load(self, source: ModelSource) -> LoadedBlocks:
        """In the torch thread: read the blocks, telling how far it is.

        Raises:
            _GivenUp: nobody wants them any more.
        """
        options = self._options
        started = last = time.monotonic()
        told = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal last, told
            if self._given_up.is_set():
                raise _GivenUp
            if self._tells_progress and (time.monotonic() - told > TELL_SECONDS or done == total):
                told = time.monotonic()
                self._tell({"weights_read": done, "weights": total})
            if time.monotonic() - last > PROGRESS_SECONDS:
                last = time.monotonic()
                logger.info("read %d of %d MB of weights", done >> 20, total >> 20)

        blocks = options.blocks or (0, source.config().num_hidden_layers)
        dtype = tensors.dtype_from_name(options.dtype)
        reading: dict[str, Any] = {"dtype": dtype, "device": options.device, "progress": progress}
        loaded, self._quantised = load_within(source, *blocks, bits=options.bits, **reading)
        logger.info("loaded blocks %d:%d in %.1f s", *blocks, time.monotonic() - started)
        return loaded


@dataclass(frozen=True)
class _Up:
    """The parts of a server that has started."""

    node: Node
    compute: ComputeThread
    handler: Handler
    announcer: Announcer
    describe: Callable[[ServerState], ServerInfo]
    placing: Placing


def _check_role(node: Node) -> None:
    """Say at once if others would not believe what this server announces.

    Raises:
        NotAMember: it has a notebook's membership.
    """
    member = node.membership
    if member is not None and member.role < Role.SERVER:
        raise NotAMember(
            f"the invitation to the swarm {member.name} is a notebook's; ask for one that was made "
            "with `swarm-notebook invite --role server`"
        )


async def _stop_node(starting: asyncio.Task[Node]) -> None:
    await asyncio.wait([starting])
    if starting.exception() is not None:
        return
    node = starting.result()
    try:
        async with asyncio.timeout(GOODBYE_SECONDS):
            if lifetime.daemon_lives(node.p2p):
                await node.stop()
            else:
                await lifetime.clear_up(node.p2p)
    except TimeoutError:
        logger.info("the network daemon did not answer a last time")


async def _end_task(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _keep_expiring(handler: Handler) -> None:
    while True:
        await asyncio.sleep(EXPIRE_SECONDS)
        await handler.expire()


def _leave_cores_alone() -> None:
    """Let torch compute in the calling thread alone, and in those that begin later.

    What a server with a card does beside it is small, and waking other cores takes longer: on an
    H100 with 16 cores a step of 16 sessions took 23 ms, of which the card was busy for 12.
    """
    torch.set_num_threads(1)


def _measure(
    span: Span,
    hidden_size: int,
    tokens: int,
    threads: int | None,
    later: Callable[[Callable[[], None]], None],
) -> tuple[Batching, throughput.Throughput]:
    """In the torch thread: whether sessions can share a call, and how fast the blocks are."""
    if span.device.type == "cuda" and threads is None:
        _leave_cores_alone()
    few_bits.install(span.layers)
    batching = Batching.try_out(span, hidden_size)
    if span.device.type == "cuda":
        batching = batching.with_decoding(span, hidden_size, tokens)
    rates = throughput.measure(span, hidden_size, batching)
    kernels.install(span.layers, later)
    return batching, rates


def _info(
    state: ServerState,
    blocks: tuple[int, int],
    options: ServeOptions,
    rates: throughput.Throughput | None = None,
    pool: CachePool | None = None,
    *,
    told: str,
    pings: Mapping[str, float] | None = None,
) -> ServerInfo:
    """What the server says of itself; not yet measured while it joins.

    Args:
        told: the digest of its checkpoint.
    """
    return ServerInfo(
        state=state,
        throughput=rates.of_span(blocks[1] - blocks[0]) if rates else 0.0,
        start_block=blocks[0],
        end_block=blocks[1],
        public_name=options.name,
        version=__version__,
        inference_rps=rates.inference_rps if rates else None,
        forward_rps=rates.forward_rps if rates else None,
        torch_dtype=options.dtype,
        quant_type="none",
        using_relay=False,
        next_pings=dict(pings) if pings else None,
        cache_tokens_left=to_petals_tokens(pool.free, blocks[1] - blocks[0]) if pool else None,
        cache_tokens_total=pool.total if pool else None,
        swarm_notebook=protocol.PROTOCOL_VERSION,
        digest=told,
    )


def _told_bits(info: ServerInfo, found: Quantised | None) -> ServerInfo:
    """The record, with what was done to the weights."""
    if found is None:
        return info
    kind = "int8" if found.bits > INT8_BITS else "int4"
    said = {"weight_bits": round(found.bits, 2), "weight_error": found.error}
    return info.model_copy(update={"quant_type": kind, **said})


def _tell(facts: dict[str, Any]) -> None:
    """One JSON line for the program that started this server."""
    # Two threads tell: in one piece, or a line of one might end up within one of the other.
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
