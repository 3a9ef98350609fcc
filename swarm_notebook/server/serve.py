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
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from swarm_notebook import __version__
from swarm_notebook.checkpoint.partial import LoadedBlocks, load_blocks
from swarm_notebook.checkpoint.source import ModelSource, resolve
from swarm_notebook.errors import ServerFailed
from swarm_notebook.net import protocol, tensors
from swarm_notebook.net.node import LOOPBACK, Node
from swarm_notebook.net.records import ModelRecord, ServerInfo, ServerState
from swarm_notebook.server import heap, lifetime, products, throughput
from swarm_notebook.server.activations import BUDGET_BYTES
from swarm_notebook.server.adapter_store import AdapterLimits
from swarm_notebook.server.announce import Announcer
from swarm_notebook.server.batching import Batching
from swarm_notebook.server.compute import ComputeThread
from swarm_notebook.server.engine import Engine
from swarm_notebook.server.handler import Handler
from swarm_notebook.server.memory import CachePool
from swarm_notebook.server.requests import Limits
from swarm_notebook.server.span import Span

logger = logging.getLogger(__name__)

CACHE_TOKENS = 16384
UPDATE_PERIOD = 60.0
LEAVE_SECONDS = 30.0
FAREWELL_SECONDS = 5.0
PROGRESS_SECONDS = 2.0
TELL_SECONDS = 0.25


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and how; see ``swarm-notebook serve --help``.

    Attributes:
        model: a Hub id, a folder or a GGUF file; None is the demo model.
        blocks: the range ``[start, end)`` to host; None is all.
        identity: file of the private key behind the peer id; written if there is none.
        cache_tokens: budget of the key-value memory (rows x positions); None is `CACHE_TOKENS`.
        activation_bytes: budget for activations that are kept for a backward pass.
        adapter_bytes: the size of the adapters of one notebook.
        adapter_max_rank: the largest rank of an adapter.
        threads: CPU threads of torch; None leaves it to torch.
        update_period: seconds between announcements.
        exit_with_stdin: leave when standard input ends.
    """

    model: str | os.PathLike[str] | None
    blocks: tuple[int, int] | None = None
    initial_peers: Sequence[str] = ()
    host_maddrs: Sequence[str] = LOOPBACK
    identity: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"
    cache_tokens: int | None = None
    activation_bytes: int = BUDGET_BYTES
    adapter_bytes: int = AdapterLimits.bytes
    adapter_max_rank: int = AdapterLimits.rank
    name: str | None = None
    threads: int | None = None
    update_period: float = UPDATE_PERIOD
    exit_with_stdin: bool = False


def main(options: ServeOptions) -> NoReturn:
    """Serve until told to leave, then end the process with exit code 0."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    with asyncio.Runner(loop_factory=lifetime.ServerLoop) as runner:
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
    async with contextlib.AsyncExitStack() as stack:
        starting = asyncio.create_task(_start(options, stack))
        await asyncio.wait([starting, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            logger.info("leaving before the server was ready")
            starting.cancel()
            return
        server = starting.result()
        ended = asyncio.create_task(lifetime.daemon_ended(server.node.p2p))
        await asyncio.wait([ended, leaving], return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise ServerFailed("the network daemon (p2pd) of this server has died")
        ended.cancel()
        await server.leave()


class _GivenUp(Exception):
    """The server ends before it has its blocks."""


@dataclass(frozen=True)
class _Server:
    """A server that is up."""

    node: Node
    handler: Handler
    announcer: Announcer
    describe: Callable[[ServerState], ServerInfo]

    async def leave(self) -> None:
        logger.info("leaving: finishing what is in flight")
        await self.handler.leave(LEAVE_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self.announcer.stop(self.describe(ServerState.OFFLINE))
        logger.info("left the swarm")


async def _start_node(options: ServeOptions, stack: contextlib.AsyncExitStack) -> Node:
    node = await Node.start(
        options.initial_peers,
        client=False,
        host_maddrs=options.host_maddrs,
        identity=options.identity,
    )
    stack.push_async_callback(_stop_node, node)
    return node


async def _stop_node(node: Node) -> None:
    if not lifetime.daemon_lives(node.p2p):
        return
    try:
        async with asyncio.timeout(FAREWELL_SECONDS):
            await node.stop()
    except TimeoutError:
        logger.info("the network daemon did not answer a last time")


async def _start(options: ServeOptions, stack: contextlib.AsyncExitStack) -> _Server:
    """Join the swarm, load the blocks, measure them and tell everybody."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # It plans anew for every length of a context: 60 ms per token instead of 15 on an H100.
    torch.backends.cuda.enable_cudnn_sdp(False)
    source = resolve(options.model)
    compute, given_up = ComputeThread(), threading.Event()
    # Both take seconds, and one mostly waits.
    loading = compute.submit(_load, source, options, given_up)

    def end_thread(error: type[BaseException] | None, *_: Any) -> None:
        # Python that ends while torch is at work in another thread aborts the process.
        if error is not None:
            given_up.set()
            loading.cancel()
            compute.stop()

    stack.push(end_thread)
    node = await _start_node(options, stack)
    facts = {
        "peer_id": node.peer_id.to_base58(),
        "maddrs": await node.addresses(),
        "pid": os.getpid(),
    }
    _tell(facts)

    loaded: LoadedBlocks = await loading.future
    config, blocks = source.config(), (loaded.start, loaded.end)
    span = Span(loaded.decoder, loaded.layers_name, loaded.start)
    loop = asyncio.get_running_loop()

    def later(call: Callable[[], None]) -> None:
        loop.call_soon_threadsafe(compute.submit, call)

    measuring = compute.submit(_measure, span, config.hidden_size, later)
    model = ModelRecord(num_blocks=config.num_hidden_layers, repository=source.repository)
    announcer = Announcer(node, source.dht_prefix, blocks, model, options.update_period)
    await announcer.announce(_info(ServerState.JOINING, blocks, options))
    batching, rates = await measuring.future
    meter = throughput.Meter(rates)
    compute.on_ran = meter.ran
    limits = Limits(
        prefix=source.dht_prefix,
        start=span.start,
        end=span.end,
        hidden_size=config.hidden_size,
        context=getattr(config, "max_position_embeddings", None),
        tokens=options.cache_tokens or CACHE_TOKENS,
    )
    pool = CachePool(limits.tokens)
    accepted = AdapterLimits(rank=options.adapter_max_rank, bytes=options.adapter_bytes)
    engine = Engine(span, options.activation_bytes, accepted, batching)
    handler = Handler(span, limits, pool, compute, engine)
    tidying = asyncio.create_task(handler.keep_tidy())
    stack.callback(tidying.cancel)
    heap.settle()
    await handler.register(node.p2p)

    def describe(state: ServerState) -> ServerInfo:
        return _info(state, blocks, options, meter.rates, pool)

    await announcer.announce(describe(ServerState.ONLINE))
    announcer.keep(lambda: describe(ServerState.ONLINE))
    _tell({"ready": True, **facts, "blocks": list(blocks), "model": source.name})
    logger.info(
        "serving blocks %d:%d of %s: %.0f tokens/s through a block in steps, %.0f in passes",
        *blocks,
        source.name,
        meter.rates.inference_rps,
        meter.rates.forward_rps,
    )
    return _Server(node, handler, announcer, describe)


def _load(source: ModelSource, options: ServeOptions, given_up: threading.Event) -> LoadedBlocks:
    """In the torch thread: read the blocks, telling how far it is.

    Raises:
        _GivenUp: nobody wants them any more.
    """
    started = last = time.monotonic()
    told = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last, told
        if given_up.is_set():
            raise _GivenUp
        # A notebook shows it; a person who reads the terminal has the log.
        if options.exit_with_stdin and (time.monotonic() - told > TELL_SECONDS or done == total):
            told = time.monotonic()
            _tell({"weights_read": done, "weights": total})
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            logger.info("read %d of %d MB of weights", done >> 20, total >> 20)

    blocks = options.blocks or (0, source.config().num_hidden_layers)
    dtype = tensors.dtype_from_name(options.dtype)
    loaded = load_blocks(source, *blocks, dtype=dtype, device=options.device, progress=progress)
    logger.info("loaded blocks %d:%d in %.1f s", *blocks, time.monotonic() - started)
    return loaded


def _measure(
    span: Span, hidden_size: int, later: Callable[[Callable[[], None]], None]
) -> tuple[Batching, throughput.Throughput]:
    """In the torch thread: whether sessions can share a call, and how fast the blocks are."""
    batching = Batching.try_out(span, hidden_size)
    rates = throughput.measure(span, hidden_size)
    products.install(span.layers, later)
    return batching, rates


def _info(
    state: ServerState,
    blocks: tuple[int, int],
    options: ServeOptions,
    rates: throughput.Throughput | None = None,
    pool: CachePool | None = None,
) -> ServerInfo:
    """What the server says of itself; not yet measured while it joins."""
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
        cache_tokens_left=pool.free if pool else None,
        cache_tokens_total=pool.total if pool else None,
        swarm_notebook=protocol.PROTOCOL_VERSION,
    )


def _tell(facts: dict[str, Any]) -> None:
    """One JSON line for the program that started this server."""
    # Two threads tell: in one piece, or a line of one might end up within one of the other.
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
