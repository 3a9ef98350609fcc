"""Servers inside of the test process, for tests that do not kill them: they start in a second."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from swarm_notebook.server.app import ServeOptions, Server


@contextmanager
def servers(folder: Path, spans: Sequence[tuple[int, int]], **options: object) -> Iterator[str]:
    """Servers of a model, one per span; gives the address of the first."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(120)  # type: ignore[arg-type]

    started: list[Server] = []
    try:
        for span in spans:
            peers = started[0].facts["maddrs"] if started else []
            made = ServeOptions(folder, span, initial_peers=peers, **options)  # type: ignore[arg-type]
            started.append(Server(made))
            run(started[-1].start())
        yield started[0].facts["maddrs"][0]
    finally:
        for server in reversed(started):
            run(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
