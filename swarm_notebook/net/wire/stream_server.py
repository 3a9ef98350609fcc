"""Serving streams: who may open how many, how errors are told, and how long a peer may listen.

A handler runs once per stream; what it raises travels as an error frame. After an error the peer
may still be sending, and p2pd, which closes both halves at once, would reset the stream: a reset
overtakes what has not been read yet, the error. So the stream stays until the peer has closed it,
for a while and for so many peers. Whoever is refused again and again is heard late
(`net.wire.conduct`).

In a private swarm the first message of a stream shows who asks; what else comes is read only if
that is a member (see `net.membership`).
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Awaitable, Callable

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from swarm_notebook.errors import BadRequest, NotAMember, RemoteError, ServerBusy
from swarm_notebook.net.membership.certificate import Membership, Role
from swarm_notebook.net.wire import protocol
from swarm_notebook.net.wire.conduct import Conduct
from swarm_notebook.net.wire.format import MAX_REQUEST_FIELDS
from swarm_notebook.net.wire.streams import (
    MAX_FRAME_BYTES,
    UNLIMITED,
    BadFrame,
    Stream,
    StreamClosed,
)
from swarm_notebook.net.wire.traffic import Traffic

logger: logging.Logger = logging.getLogger(__name__)

# How long a peer may not read before it is given up: it may be swapped out, or far behind.
UNHEARD_SECONDS = 20.0
# What a stream takes by itself: a task or two, its buffers, its answers to rubbish.
STREAM_BYTES = 64 << 10
# What a member shows takes 200 bytes.
MAX_SHOWN_BYTES = 512

_serving: set[asyncio.Task[None]] = set()


async def add_stream_handler(
    p2p: P2P,
    name: str,
    handler: Callable[[Stream, PeerID], Awaitable[None]],
    max_frame: int = MAX_FRAME_BYTES,
    traffic: Traffic | None = None,
    *,
    conduct: Conduct | None = None,
    membership: Membership | None = None,
    role: Role = Role.NOTEBOOK,
) -> None:
    """Serve `name`: `handler` runs once per stream. When it returns, the answers end.

    Args:
        traffic: what all streams may hold together; each has an account, closed in the end.
        conduct: what is remembered of peers, for all handlers of a server.
        membership: of a private swarm, whose members alone are heard, in this ``role`` at least.
    """
    traffic = traffic or Traffic(UNLIMITED, UNLIMITED)
    known = conduct or Conduct()
    price = stream_price(traffic.total)

    async def serve(stream: Stream, peer: PeerID) -> None:
        await known.turn(stream.peer)
        await _admit(stream, peer, handler, membership, role)

    async def on_stream(
        info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        # Held, because uvloop holds neither a task that waits for its stream nor the stream: both
        # would be freed as a circle that nobody knows.
        if (task := asyncio.current_task()) is not None:
            _serving.add(task)
            task.add_done_callback(_serving.discard)
        peer = info.peer_id.to_base58()
        if known.cut_off(peer):
            writer.transport.abort()
            return
        known.met(peer, info.addr)
        base, account = traffic.open(peer), traffic.open(peer)
        stream = Stream(
            reader, writer, peer, max_frame, max_fields=MAX_REQUEST_FIELDS, account=account
        )
        try:
            if not base.try_take(price):
                busy = ServerBusy("too many streams are open here; close some")
                await _refuse(stream, busy, known)
            elif await _guarded(stream, serve(stream, info.peer_id), known):
                await stream.end_answers()
            account.close()
            base.close()
            await known.linger(stream)
        except StreamClosed:
            logger.debug("%s: peer %s left", name, stream.peer)
        finally:
            known.answered(peer, stream.sent)
            account.close()
            base.close()
            stream.close()

    await p2p.add_binary_stream_handler(name, on_stream)


def stream_price(total: int) -> int:
    """What each stream takes of ``total`` bytes, so that they leave half of the descriptors."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors <= 0 or total >= UNLIMITED:
        return STREAM_BYTES
    return max(STREAM_BYTES, 2 * total // descriptors)


async def _admit(
    stream: Stream,
    peer: PeerID,
    handler: Callable[[Stream, PeerID], Awaitable[None]],
    membership: Membership | None,
    role: Role,
) -> None:
    """Run a handler; in a private swarm for members only, and as long as they are members."""
    if membership is None:
        await handler(stream, peer)
        return
    certificate = membership.check(stream.peer, await _shown(stream), role)
    with membership.holding(certificate, stream.abort):
        await handler(stream, peer)


async def _shown(stream: Stream) -> object:
    """What a peer shows of itself in its first message; nothing else is read of a stranger."""
    limit, stream.max_frame = stream.max_frame, MAX_SHOWN_BYTES
    try:
        async with asyncio.timeout(UNHEARD_SECONDS):
            message = await stream.receive()
    except BadFrame:
        return None
    except TimeoutError:
        raise NotAMember("this swarm is private, and nothing was shown in time") from None
    finally:
        stream.max_frame = limit
    stream.account.resize(0)
    return shown_in(message.metadata) if message is not None else None


def shown_in(metadata: bytes) -> object:
    """What a peer shows in the metadata of a message."""
    try:
        return protocol.unpack_metadata(metadata).get(protocol.MEMBER)
    except BadRequest:
        return None


async def _guarded(stream: Stream, work: Awaitable[None], conduct: Conduct) -> bool:
    """Run a handler; what it raises is logged and sent to the peer. Whether it raised nothing."""
    try:
        await work
    except StreamClosed:
        raise
    except RemoteError as error:
        await _refuse(stream, error, conduct)
    except Exception as error:
        logger.exception("a request of %s failed", stream.peer)
        await _tell(stream, error)
    else:
        return True
    return False


async def _refuse(stream: Stream, error: RemoteError, conduct: Conduct) -> None:
    """Tell a peer why it gets nothing, and remember it."""
    await _tell(stream, conduct.refusal(stream.peer, error, stream.unanswered))


async def _tell(stream: Stream, error: Exception) -> None:
    """Send an error; a peer that does not read cannot keep the stream for that."""
    try:
        async with asyncio.timeout(UNHEARD_SECONDS):
            await stream.send_error(error)
    except TimeoutError:
        stream.abort()
        raise StreamClosed(f"peer {stream.peer} does not read") from None
