"""Opening streams, and what becomes of those that nobody waits for any more.

Nothing can be called back: p2pd was told to dial, and a stream that comes of it later is to be
ended, or it would be half open for good. Until then the task that waits for it is held here. A loop
keeps none alive, and asyncio lets a socket know its reader by a weak reference, so that one whose
caller has gone would be garbage while it waits. When a peer ends its daemon, all of its waits end.

In a private swarm the first message of a stream is a request without tensors, whose metadata show
who asks (see `net.membership`).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

from hivemind.p2p import P2P, P2PDaemonError, PeerID

from swarm_notebook.net.membership.certificate import Membership
from swarm_notebook.net.wire import protocol
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.net.wire.streams import MAX_FRAME_BYTES, ByteMeter, Stream
from swarm_notebook.net.wire.traffic import Account

# A socket whose other end has gone tells so in the loop's next turn.
SETTLE_SECONDS = 1.0

# What waits for p2pd, by the peer that it belongs to.
_opening: defaultdict[P2P, set[asyncio.Task[Stream]]] = defaultdict(set)


async def open_stream(
    p2p: P2P,
    peer: PeerID,
    handler: str,
    meter: ByteMeter | None = None,
    max_frame: int = MAX_FRAME_BYTES,
    *,
    account: Account | None = None,
    membership: Membership | None = None,
) -> Stream:
    """A new stream to `handler` of `peer`.

    Args:
        account: where answers are counted; see `Stream`.
        membership: shown to the peer; a round trip more is not needed for it.

    Raises:
        P2PDaemonError: the peer cannot be reached, or the daemon has ended.
    """

    async def opened() -> Stream:
        try:
            _, reader, writer = await p2p.call_binary_stream_handler(peer, handler)
        except asyncio.IncompleteReadError:
            raise P2PDaemonError("the network daemon of this peer has ended") from None
        name = peer.to_base58()
        return Stream(reader, writer, name, max_frame, meter, answers=True, account=account)

    opening = asyncio.create_task(opened())
    _opening[p2p].add(opening)
    opening.add_done_callback(lambda done: _forget(p2p, done))
    try:
        # Not cancelled itself: that would leave the stream half open for good.
        stream = await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(abort_opened)
        raise
    if membership is not None:
        try:
            await stream.send(PackedMessage(metadata=show(membership)))
        except BaseException:
            stream.abort()
            raise
    return stream


def show(membership: Membership) -> bytes:
    """The metadata by which a member shows that it is one."""
    return protocol.pack_metadata({protocol.MEMBER: membership.shown})


def abort_opened(opening: asyncio.Future[Stream]) -> None:
    """End a stream that came when nobody waited for it any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abort()


async def settle(p2p: P2P) -> None:
    """Wait for what was being opened when the daemon of this peer ended, which ends it."""
    if waiting := _opening.get(p2p):
        _, late = await asyncio.wait(waiting, timeout=SETTLE_SECONDS)
        for one in late:
            one.cancel()


def _forget(p2p: P2P, opening: asyncio.Task[Stream]) -> None:
    waiting = _opening[p2p]
    waiting.discard(opening)
    if not waiting:
        del _opening[p2p]
