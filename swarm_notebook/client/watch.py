"""Noticing a server that hangs, without a timer per byte or a task per request.

While a request takes longer than a moment, its server is asked for a sign of life every few
seconds. None: the request is given up, which ends the wait for its answer. A slow server may be
slow up to a limit, and is named on a line that goes away again.

Where others have its blocks, a silent server is left sooner, as that costs little if it was only
late: what it had is computed again elsewhere. So silence is borne for as long as its pings make
likely (`servers.detector`), and for as long as the work elsewhere would take (`seconds_elsewhere`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Self

from swarm_notebook.client.servers.detector import is_done
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment, prompt_seconds
from swarm_notebook.errors import RemoteError, ServerFailed, ServerGone
from swarm_notebook.net.wire.opening import abort_opened
from swarm_notebook.net.wire.streams import TRANSPORT_ERRORS, ByteMeter, Stream
from swarm_notebook.progress import Waiting

# Most steps take less: what takes longer is watched. A ping takes a server about what opening a
# stream does (0.4 ms), which is nothing beside a request of so long.
LOOK_AFTER = 0.15
# A dial takes a few round trips, the longest about 0.3 s; the rest is for busy machines.
OPEN_TIMEOUT = 5.0
# The longest silence that is borne.
LOOK_TIMEOUT = 2.5
# Bytes per second of a slow uplink at home: a ping waits behind what is being sent.
UPLINK = 1 << 20
# Between two looks, and where others have the blocks: a server may be lost in a long request, too.
WATCH_PERIOD, SHORT_PERIOD = 2.0, 0.25
# A push over two continents takes less; what comes twice is dropped.
NUDGE_AFTER = 2.0
# A long prompt may take so long on processors without anything being wrong.
TELL_AFTER = 8.0
# As long as Petals' servers work on one step before they give it up.
REQUEST_LIMIT = 180.0


class Watch:
    """Watches one request, around which it is entered, once that has taken longer than a moment.

    What the transport raises meanwhile becomes the failure of the server.

    Args:
        server: what to call it in messages.
        what: says what is waited for; only asked when there is something to say.
        give_up: ends the wait for the answer.
        elsewhere: as of `seconds_elsewhere`.
        nudge: called when the request has taken `NUDGE_AFTER`.

    Attributes:
        verdict: why the request was given up, or empty.
    """

    verdict: str

    def __init__(
        self,
        directory: Directory,
        peer: str,
        server: str,
        what: Callable[[], str],
        give_up: Callable[[], object],
        *,
        elsewhere: float = 0.0,
        nudge: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.verdict, self._alive = "", True
        self._directory, self._peer, self._server = directory, peer, server
        self._what, self._give_up = what, give_up
        self._elsewhere, self._nudge = elsewhere, nudge
        self._task: asyncio.Task | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._shown: Waiting | None = None

    def __enter__(self) -> Self:
        self._timer = asyncio.get_running_loop().call_later(LOOK_AFTER, self._begin)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        if self._shown is not None:
            self._shown.__exit__()
        if not isinstance(error, TRANSPORT_ERRORS):
            return
        if self.verdict:
            kind = ServerFailed if self._alive else ServerGone
            raise kind(f"{self._server} {self.verdict}") from None
        reason = str(error) or "no answer in time"
        raise ServerGone(f"{self._server} is gone ({reason})") from None

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        began = time.monotonic() - LOOK_AFTER
        nudge = self._nudge
        while not self.verdict:
            self._alive = await self._look()
            waited = time.monotonic() - began
            if not self._alive:
                self.verdict = f"has not answered for {waited:.0f} s"
            elif waited > REQUEST_LIMIT:
                self.verdict = f"has not finished {self._what()} in {waited:.0f} s"
            else:
                if waited > TELL_AFTER and self._shown is None:
                    self._shown = Waiting(f"Waiting for {self._what()}", began=began, after=0.0)
                    self._shown.__enter__()
                if nudge is not None and waited >= NUDGE_AFTER:
                    with contextlib.suppress(RemoteError):  # whoever waits for the answer meets it
                        await nudge()
                    nudge = None
                others = self._directory.replaceable(self._peer)
                pause = SHORT_PERIOD if others else WATCH_PERIOD
                if nudge is not None:
                    pause = min(pause, max(0.0, NUDGE_AFTER - waited))
                await asyncio.sleep(pause)
        self._give_up()

    async def _look(self) -> bool:
        """Whether the server answers; where nobody else has its blocks it is asked twice."""
        detector = self._directory.detector
        if await detector.is_there(self._peer, self._borne):
            return True
        if self._directory.replaceable(self._peer):
            return False
        return await detector.is_there(self._peer, self._borne)

    def _borne(self) -> float:
        """Seconds of silence that are borne, as things are."""
        borne = self._directory.detector.borne(self._peer)
        if borne is None or not self._directory.replaceable(self._peer):
            return LOOK_TIMEOUT
        return min(borne + self._elsewhere, LOOK_TIMEOUT)


async def open_stream(
    directory: Directory, peer: str, server: str, rpc: str, meter: ByteMeter
) -> Stream:
    """A new stream to a peer, which is watched while that is waited for.

    Raises:
        ServerGone: it gives no sign of life, or nothing comes of it in `OPEN_TIMEOUT`.
    """
    opening = asyncio.ensure_future(directory.node.open_stream(peer, rpc, meter))
    what = f"{server} to open a stream"
    with Watch(directory, peer, server, lambda: what, opening.cancel) as watch:
        try:
            if await is_done(opening, OPEN_TIMEOUT):
                return opening.result()
            raise TimeoutError
        except asyncio.CancelledError:
            opening.add_done_callback(abort_opened)
            if watch.verdict:
                raise TimeoutError from None
            raise
        finally:
            opening.cancel()


def seconds_elsewhere(segment: RouteSegment, tokens: int, size: int) -> float:
    """About how long another server would take for what one has in hand.

    Args:
        tokens: those of all sequences that go through its blocks again.
        size: bytes that are sent for it.
    """
    return tokens * prompt_seconds(segment) + size / UPLINK
