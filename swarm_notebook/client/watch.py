"""Noticing a server that hangs, without a timer per byte or a task per request.

While a request takes longer than a moment, its server is asked for a sign of life every few
seconds. None: the request's stream is closed, which ends the wait for its answer. So a dead
machine is noticed in seconds, and a slow one may be slow up to a limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Self

from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.errors import RemoteError, ServerFailed, ServerGone
from swarm_notebook.net.wire.streams import Stream

logger = logging.getLogger(__name__)

# A step takes milliseconds to a second: what takes longer is watched. A ping is an answer of a
# hundred bytes, which costs nothing beside a request of half a second. So a dead server whose
# blocks others have is noticed after three seconds.
LOOK_AFTER = 0.5
LOOK_TIMEOUT = 2.5
WATCH_PERIOD = 2.0
# A push over two continents takes less; what comes twice is dropped.
NUDGE_AFTER = 2.0
# A long prompt may take so long on processors without anything being wrong.
TELL_AFTER = 8.0
# As long as Petals' servers work on one step before they give it up.
REQUEST_LIMIT = 180.0


class Watch:
    """Watches one request, around which it is entered, once that has taken longer than a moment.

    Args:
        what: says what is waited for; only asked when there is something to say.
        nudge: called when the request has taken `NUDGE_AFTER`.

    Attributes:
        verdict: why the request was given up, or empty.
    """

    def __init__(
        self,
        directory: Directory,
        peer: str,
        what: Callable[[], str],
        stream: Stream,
        nudge: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.verdict, self._alive = "", True
        self._directory, self._peer, self._what, self._stream = directory, peer, what, stream
        self._nudge = nudge
        self._task: asyncio.Task | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._timer = asyncio.get_running_loop().call_later(LOOK_AFTER, self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def error(self, server: str) -> ServerFailed:
        """The verdict on a server of this name as an error."""
        kind = ServerFailed if self._alive else ServerGone
        return kind(f"{server} {self.verdict}")

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        began = time.monotonic() - LOOK_AFTER
        tell_after, nudge = TELL_AFTER, self._nudge
        while not self.verdict:
            self._alive = await self._look()
            waited = time.monotonic() - began
            if not self._alive:
                self.verdict = f"has not answered for {waited:.0f} s"
            elif waited > REQUEST_LIMIT:
                self.verdict = f"has not finished {self._what()} in {waited:.0f} s"
            else:
                if waited > tell_after:
                    logger.warning("still waiting for %s, %.0f s so far", self._what(), waited)
                    tell_after *= 2
                if nudge is None:
                    await asyncio.sleep(WATCH_PERIOD)
                    continue
                await asyncio.sleep(max(0.0, NUDGE_AFTER - waited))
                with contextlib.suppress(RemoteError):  # whoever waits for the answer meets it
                    await nudge()
                nudge = None
        self._stream.abort()

    async def _look(self) -> bool:
        """Whether the server answers; where nobody else has its blocks it is asked twice."""
        if await self._directory.ping(self._peer, LOOK_TIMEOUT):
            return True
        if self._directory.replaceable(self._peer):
            return False
        return await self._directory.ping(self._peer, LOOK_TIMEOUT)
