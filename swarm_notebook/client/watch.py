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
from swarm_notebook.net.streams import Stream

logger = logging.getLogger(__name__)

# A step takes milliseconds to a second: what takes longer is watched. So a dead server is noticed
# after this and the timeout of one ping, five seconds in all.
WATCH_AFTER = 2.0
WATCH_PERIOD = 2.0
# A long prompt may take so long on processors without anything being wrong.
TELL_AFTER = 8.0
# As long as Petals' servers work on one step before they give it up.
REQUEST_LIMIT = 180.0


class Watch:
    """Watches one request, around which it is entered, once that has taken longer than a moment.

    Args:
        what: says what is waited for; only asked when there is something to say.
        nudge: called first, when the request has taken longer than a moment.

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
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER, self._begin)
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
        began = time.monotonic() - WATCH_AFTER
        tell_after = TELL_AFTER
        if self._nudge is not None:
            with contextlib.suppress(RemoteError):  # whoever waits for the answer will meet it
                await self._nudge()
        while not self.verdict:
            self._alive = await self._directory.ping(self._peer)
            waited = time.monotonic() - began
            if not self._alive:
                self.verdict = f"has not answered for {waited:.0f} s"
            elif waited > REQUEST_LIMIT:
                self.verdict = f"has not finished {self._what()} in {waited:.0f} s"
            else:
                if waited > tell_after:
                    logger.warning("still waiting for %s, %.0f s so far", self._what(), waited)
                    tell_after *= 2
                await asyncio.sleep(WATCH_PERIOD)
        self._stream.abort()
