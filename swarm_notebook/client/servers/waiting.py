"""Blocks that no server holds just now: waiting for one, or saying at once why none will do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection

from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import (
    ONE_TOKEN,
    RouteSegment,
    Work,
    describe_blocks,
)
from swarm_notebook.client.servers.snapshot import Shortage
from swarm_notebook.errors import ConnectionFailed, MissingBlocks, OtherCheckpoint

logger: logging.Logger = logging.getLogger(__name__)

# Between two looks for servers that are back.
WAIT_PERIOD = 0.5


async def await_chain(
    directory: Directory,
    start: int,
    end: int,
    exclude: Collection[str] = (),
    work: Work = ONE_TOKEN,
) -> list[RouteSegment]:
    """`Directory.chain`, waited for up to its ``patience`` when some blocks have no server.

    Raises:
        MissingBlocks: no server has come.
        NotAMember: the swarm is private, or this notebook is a member no more.
    """
    deadline = time.monotonic() + directory.patience
    shortage: Shortage | None = None
    try:
        while True:
            try:
                chain = directory.chain(start, end, exclude, work)
                directory.bits.use(chain)
                return chain
            except MissingBlocks as error:
                check_membership(directory)
                left = deadline - time.monotonic()
                missing = directory.missing_within(start, end, exclude) or [start, end - 1]
                if left <= 0:
                    raise MissingBlocks(
                        f"{error}. Waited {directory.patience:.0f} s for a server; start one with "
                        f"`swarm-notebook serve … --blocks {missing[0]}:{missing[-1] + 1}` and "
                        "call again"
                    ) from None
                if shortage is None:
                    logger.warning("%s; waiting up to %.0f s", error, directory.patience)
                    shortage = Shortage(
                        describe_blocks(missing),
                        directory.recent.holders(missing),
                        time.time(),
                        directory.patience,
                    )
                    directory.shortages.append(shortage)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await _look(directory, start, end, exclude)
                    await asyncio.sleep(WAIT_PERIOD)
    finally:
        if shortage is not None:
            directory.shortages.remove(shortage)


async def _look(directory: Directory, start: int, end: int, exclude: Collection[str]) -> None:
    """Look for servers of these blocks, old and new ones."""
    with contextlib.suppress(ConnectionFailed):
        await directory.node.revive()
    # A known server that is back says so at once; a search of the DHT may be held up by many that
    # are gone. Meanwhile it is found out whether the connections are what is gone.
    silent = [peer for peer in directory.heard if directory.health.is_silent(peer)]
    redialling = asyncio.create_task(directory.node.redial(directory.heard, silent))
    try:
        if await _try_avoided(directory, start, end, exclude):
            return
        await redialling
        if await _try_avoided(directory, start, end, exclude):
            return
        await directory.refresh()
        await _try_avoided(directory, start, end, exclude)
    finally:
        redialling.cancel()
        await asyncio.gather(redialling, return_exceptions=True)


async def _try_avoided(
    directory: Directory, start: int, end: int, exclude: Collection[str]
) -> bool:
    """Use servers again that have failed, for blocks that nobody else has, if they answer.

    Returns:
        whether all of the blocks have a server now.
    """
    missing = directory.missing_within(start, end, exclude)
    avoided = [
        span
        for span in directory.snapshot.spans
        if span.peer not in exclude
        and directory.avoided(span.peer)
        and any(span.start <= block < span.end for block in missing)
    ]
    pings = [asyncio.ensure_future(directory.ping(span.peer)) for span in avoided]
    try:
        # Not all are waited for: some of them may be gone for good.
        for ping in asyncio.as_completed(pings):
            if await ping and not directory.missing_within(start, end, exclude):
                return True
    finally:
        for ping in pings:
            ping.cancel()
    for span in avoided:
        if directory.avoided(span.peer) and directory.health.give_chance(span.peer):
            logger.info("trying %s again, as nobody else has its blocks", span.name)
    return not directory.missing_within(start, end, exclude)


def check_membership(directory: Directory) -> None:
    """See to it that servers are not missing only because they do not let this notebook in.

    Raises:
        NotAMember: the swarm is private, or this notebook is a member no more.
    """
    if directory.node.membership is not None:
        directory.node.membership.check_own()
    # Whoever says so may lie; it counts where blocks are missing besides.
    if directory.refused and directory.missing():
        raise directory.refused[0]


def check_checkpoint(directory: Directory) -> None:
    """See to it that servers are not missing only because they have another checkpoint.

    Raises:
        OtherCheckpoint: they are; it names both digests.
    """
    missing, others = set(directory.missing()), directory.snapshot.others
    spans = [span for span in directory.snapshot.spans if span.peer in others]
    theirs = {block for span in spans for block in range(span.start, span.end)}
    if missing and missing <= theirs:
        first = next(span for span in spans if missing & set(range(span.start, span.end)))
        raise OtherCheckpoint(
            f"{directory.prefix}: server {first.name} (blocks {first.start}:{first.end}) is not "
            f"used: {others[first.peer]}, and nobody else has its blocks. Give the folder or "
            "file that the servers were started with, or start servers with this notebook's"
        )
