"""Coming into a swarm whose peers, or whose own machine, have no time just now.

p2pd gives a peer of its own network 5 s for a handshake and ends if it met nobody; hivemind asks
the initial peers once, and waits 3 s. A machine that starts several servers, or loads a large
model, is slower than that now and then, and a peer that accepts connections is not gone because it
is late. Both are tried again here within `PATIENCE`, more patiently each time; what is certain (a
port that is closed, another peer at the address, a clock that is wrong, a refusal) is said at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID

from swarm_notebook.errors import NotAMember, RemoteError, from_wire
from swarm_notebook.net.wire import protocol, streams

logger: logging.Logger = logging.getLogger(__name__)

# What a server of ours may need to start, after which a peer that is there has time to answer.
PATIENCE = 30.0
# Sooner than this, p2pd has been refused; it gives up on silence after 5 s at the earliest.
SILENCE_SECONDS = 4.0
# Between two calls of a peer that is connected and does not know the call yet: it is starting.
PAUSE_SECONDS = 0.5
# For a peer's word why it does not know this one.
REFUSAL_SECONDS = 3.0
# hivemind's word where a peer answers and cannot call back.
_UNREACHED = "can't access this node"
# How p2pd's end sounds where nobody answered it, and hivemind's where p2pd said nothing in time.
_SILENT = ("failed to connect to bootstrap peers", "Daemon failed to start in")


async def start_daemon(start: Callable[[], Awaitable[P2P]], deadline: float) -> P2P:
    """Start p2pd; again, as long as there is time, if initial peers were silent.

    Args:
        deadline: by `time.monotonic`.

    Raises:
        P2PDaemonError: it does not start, or no initial peer let it in.
    """
    while True:
        began = time.monotonic()
        try:
            return await start()
        except P2PDaemonError as error:
            now = time.monotonic()
            silent = now - began > SILENCE_SECONDS and any(text in str(error) for text in _SILENT)
            if not silent or now > deadline:
                raise
            say_late(deadline - now)


async def meet(dht: DHTNode, peers: Sequence[PeerID], deadline: float) -> bool:
    """Make this peer and the initial ones known to each other; whether any of them answered.

    Args:
        deadline: by `time.monotonic`.

    Raises:
        ValidationError: a clock is wrong, or this peer cannot be reached.
        NotAMember: the swarm is private, and this peer is to be a server.
    """
    usual = seconds = dht.protocol.wait_timeout
    try:
        while True:
            unreached: ValidationError | None = None
            try:
                if await _ask(dht, peers, usual):
                    break
            except ValidationError as error:
                if _UNREACHED not in str(error):
                    raise
                # They have 3 s for that, in which this process may have been held up.
                if (refusal := await _refusal(dht.protocol.p2p, peers)) is not None:
                    raise refusal from None
                unreached = error
            left = deadline - time.monotonic()
            if left <= 0:
                if unreached is not None:
                    raise unreached
                return False
            say_late(left)
            await asyncio.sleep(min(PAUSE_SECONDS, left))
            seconds = min(2 * seconds, max(left, usual))
            dht.protocol.wait_timeout = seconds
    finally:
        dht.protocol.wait_timeout = usual
    # Who would be asked for the same keys is met by a search for oneself, which may go on longer.
    await asyncio.wait([asyncio.create_task(dht.find_nearest_nodes([dht.node_id]))], timeout=usual)
    return True


async def _ask(dht: DHTNode, peers: Sequence[PeerID], moment: float) -> bool:
    """Ping all peers, of which those that are slower than the first by a moment do not matter."""
    pings = [asyncio.create_task(dht.protocol.call_ping(peer, validate=True)) for peer in peers]
    try:
        answered = False
        for ping in asyncio.as_completed(pings):
            if answered := await ping is not None:
                break
        if answered:
            await asyncio.wait(pings, timeout=moment)
            for ping in pings:
                if ping.done():
                    await ping  # raises what a peer objects to
        return answered
    finally:
        for ping in pings:
            ping.cancel()
        await asyncio.gather(*pings, return_exceptions=True)


async def _refusal(p2p: P2P, peers: Sequence[PeerID]) -> RemoteError | None:
    """What a private swarm says to a server that is none of its members.

    To such a one its peers do not say, as others do, whether they can reach it.
    """
    for peer in peers:
        with contextlib.suppress(*streams.TRANSPORT_ERRORS):
            try:
                async with asyncio.timeout(REFUSAL_SECONDS):
                    await p2p._client.call_unary_handler(peer, protocol.RPC_INFO, b"")
            except P2PHandlerError as error:
                if str(error).startswith(f"{NotAMember.code}: "):
                    return from_wire(str(error), peer.to_base58())
    return None


def say_late(left: float) -> None:
    """Say that those who let this peer in have not said anything yet, and how long they may be."""
    logger.warning("no initial peer has answered yet; asking them for up to %.0f s more", left)
