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
from collections.abc import Iterator

from swarm_notebook.client.directory import Directory
from swarm_notebook.net.streams import Stream

logger = logging.getLogger(__name__)

WATCH_AFTER = 2.0
WATCH_PERIOD = 2.0
TELL_AFTER = 8.0
REQUEST_LIMIT = 180.0


class Watch:
    """Watches one request; `verdict` says why it was given up, or is empty."""

    def __init__(self, directory: Directory, peer: str, what: str, stream: Stream):
        self.verdict = ""
        self._directory, self._peer, self._what, self._stream = directory, peer, what, stream
        self._task: asyncio.Task | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around the request: watch it once it has taken longer than a moment."""
        loop = asyncio.get_running_loop()

        def begin() -> None:
            self._task = loop.create_task(self._watch())

        timer = loop.call_later(WATCH_AFTER, begin)
        try:
            yield
        finally:
            timer.cancel()
            if self._task is not None:
                self._task.cancel()

    async def _watch(self) -> None:
        began = time.monotonic() - WATCH_AFTER
        while not self.verdict:
            alive = await self._directory.ping(self._peer)
            waited = time.monotonic() - began
            if not alive:
                self.verdict = f"has not answered for {waited:.0f} s"
            elif waited > REQUEST_LIMIT:
                self.verdict = f"has not finished {self._what} in {waited:.0f} s"
            else:
                if waited > TELL_AFTER:
                    logger.info("still waiting for %s, %.0f s so far", self._what, waited)
                await asyncio.sleep(WATCH_PERIOD)
        self._stream.abort()
