"""The process around a server: where it begins, which server it holds, when it ends.

It begins as a fresh interpreter (``swarm-notebook serve``), never as a fork. Standard output
carries JSON lines for programs: first where the server listens, at last ``"ready": true`` with all
that is needed to use it. People read the log on standard error.

SIGTERM, SIGINT and, with ``exit_with_stdin``, the end of standard input make it leave: steps in
flight are answered, the swarm is told, the exit code is 0. A server that has chosen its blocks
itself gives way to another one as soon as other blocks need it more. Where that one keeps some of
them, it serves until the other one does and each of its blocks has another server.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

import torch
from hivemind.p2p import P2PDaemonError

from swarm_notebook.errors import ConnectionFailed, ServerFailed
from swarm_notebook.net.p2p.loop import PeerLoop
from swarm_notebook.server.app import Server
from swarm_notebook.server.memory import heap
from swarm_notebook.server.options import ServeOptions
from swarm_notebook.server.presence.arrival import GOODBYE_SECONDS
from swarm_notebook.server.presence.moving import Move
from swarm_notebook.stdin import at_end_of_stdin

logger: logging.Logger = logging.getLogger(__name__)

# For so long a thread keeps the interpreter's lock if others want it, in seconds; Python's own 5 ms
# are a long time where every operator of torch gives it back and wants it again. While what was
# compiled was loaded beside it, a prompt of 2,048 tokens through 32 blocks on an H200, which takes
# 0.17 s by itself, took 3.4 s with them and 1.7 with this.
SWITCH_SECONDS = 2e-4
# Until others serve the blocks that a server leaves, and notebooks have read of it, which takes a
# quarter of that. After so long those others have gone, and whatever was planned is old.
REPLACED_SECONDS = 60.0


def main(options: ServeOptions) -> NoReturn:
    """Serve until told to leave, then end the process with exit code 0."""
    heap.bound_compiled()
    sys.setswitchinterval(SWITCH_SECONDS)
    # PEFT warns of configs. They are the notebook's, whose own PEFT has warned there.
    warnings.filterwarnings("ignore", module=r"peft\.tuners\.")
    # It plans anew for every length of a context: 60 ms per token instead of 15 on an H100.
    torch.backends.cuda.enable_cudnn_sdp(False)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    with asyncio.Runner(loop_factory=server_loop) as runner:
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
    leaving = asyncio.create_task(_leaving(options.exit_with_stdin).wait())
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    server: Server | None = _server(Move(options, {}))
    while server is not None:
        options, known = server.options, server.known
        try:
            if not server.up:
                await _start(server, leaving)
            server = await _next(server, leaving) if server.up else None
        except ConnectionFailed as error:
            if not options.chosen:
                raise
            logger.warning("%s; trying again", error)
            await asyncio.wait([leaving], timeout=GOODBYE_SECONDS)
            server = None if leaving.done() else _server(Move(options, known))
        if server is not None:
            # It needs the memory of the last one.
            gc.unfreeze()
            gc.collect()


def _server(move: Move) -> Server:
    # A notebook shows how far it is; a person who reads the terminal has the log.
    progress = move.options.exit_with_stdin
    return Server(move.options, _tell, progress=progress, known=move.known, kept=move.kept)


async def _start(server: Server, leaving: asyncio.Task[Any]) -> None:
    """Start a server; if told to leave meanwhile, it is not up.

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
            f"the network daemon cannot listen on {', '.join(server.options.host_maddrs)}; is the "
            f"port taken? Choose another one with --host-maddrs ({error})"
        ) from None


async def _next(server: Server, leaving: asyncio.Task[Any]) -> Server | None:
    """Serve until told to leave, or until another server of this process is to go on.

    Returns:
        the server to go on with, which may be up; None if told to leave.

    Raises: as `serve`.
    """
    heap.freeze()
    trimming = asyncio.create_task(server.trim())
    ended = asyncio.create_task(server.daemon_ended())
    moving = asyncio.create_task(server.better_place())
    successor: Server | None = None
    try:
        while successor is None:
            await asyncio.wait([ended, leaving, moving], return_when=asyncio.FIRST_COMPLETED)
            if ended.done() or leaving.done():
                break
            move = moving.result()
            if not move.beside:
                successor = _server(move)
            elif (successor := await _started_beside(server, move, leaving)) is None:
                moving = asyncio.create_task(server.better_place())
    finally:
        for task in (trimming, ended, moving):
            task.cancel()
    failed = ended.done() and not ended.cancelled()
    await server.stop(hurry=successor is not None and move.hurry)
    if leaving.done() and successor is not None:
        await successor.stop()
    if failed and successor is None:
        raise ServerFailed("the network daemon (p2pd) of this server has died")
    return None if leaving.done() else successor


async def _started_beside(server: Server, move: Move, leaving: asyncio.Task[Any]) -> Server | None:
    """A server in another place, as soon as one that serves until then is not needed any more.

    Returns:
        None if that did not come to pass, or if told to leave.
    """
    successor = Server(move.options, known=move.known, kept=move.kept, goal=move.goal)

    async def take_over() -> None:
        await successor.start()
        if move.goal is None:
            _tell(successor.facts)
        async with asyncio.timeout(REPLACED_SECONDS):
            await server.replaced()
        _tell(successor.facts)

    taking = asyncio.create_task(take_over())
    ended = asyncio.create_task(server.daemon_ended())
    await asyncio.wait([taking, ended, leaving], return_when=asyncio.FIRST_COMPLETED)
    failed = taking.done() and taking.exception()
    taking.cancel()
    ended.cancel()
    await asyncio.wait([taking], timeout=GOODBYE_SECONDS)
    if successor.up and not failed and not leaving.done():
        return successor
    await successor.stop()
    if not leaving.done():
        why = str(failed or "") or "it took too long"
        logger.warning("staying: the other blocks cannot be served (%s)", why)
        _tell(server.facts)
        await asyncio.wait([leaving], timeout=GOODBYE_SECONDS)
    return None


def _tell(facts: dict[str, Any]) -> None:
    """One JSON line for the program that started this server; for people, how to reach it."""
    text = json.dumps(facts)
    if sys.stdout.isatty():
        if not facts.get("ready"):
            return
        text = "\n  ".join(["addresses, for --initial-peers and %swarm connect:", *facts["maddrs"]])
    # Two threads tell: in one piece, or a line of one might end up within one of the other.
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _leaving(exit_with_stdin: bool) -> asyncio.Event:
    """An event that is set when the process is told to leave; for the running loop."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)

    def leave() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(event.set)

    if exit_with_stdin:
        at_end_of_stdin(leave)
    return event


def server_loop() -> PeerLoop:
    """The loop of a server's process.

    A server that leads its own session (a notebook starts it so) has no terminal; its children stay
    in its group, so that all can be ended at once.
    """
    return PeerLoop(detached=os.getsid(0) != os.getpid())
