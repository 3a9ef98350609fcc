"""What a server says of itself, and telling it to the swarm again and again.

The records are Petals' (see `net.dht.records`): the same tuple under the key of every hosted block,
valid for two periods, so that a server that dies is forgotten, and signed. The model itself is
entered in the model index, unless its prefix marks it as private with an underscore.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from hivemind.utils import get_dht_time

from swarm_notebook import __version__
from swarm_notebook.net.dht.records import (
    MAX_SECONDS,
    MAX_WORDS,
    MODEL_INDEX_KEY,
    ModelRecord,
    ServerInfo,
    ServerState,
    signed_record,
    to_petals_tokens,
)
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire import protocol
from swarm_notebook.server.engine.kv.budget import CachePool
from swarm_notebook.server.engine.quantising.loading import Quantised
from swarm_notebook.server.engine.throughput import Throughput
from swarm_notebook.server.options import ServeOptions
from swarm_notebook.server.presence.flow import Moves

logger: logging.Logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Records of a server that announces more often than every second and a half (in tests).
MIN_EXPIRATION = 3.0
# After an announcement that no peer took: the next one is due in a minute.
RETRY_SECONDS = 5.0
# Weights with more bits than this have 8 for the most part.
INT8_BITS = 6.5


def describe(
    blocks: tuple[int, int],
    options: ServeOptions,
    digest: str,
    quantised: Quantised | None,
    state: ServerState,
    *,
    rates: Throughput | None = None,
    engine: str | None = None,
    pool: CachePool | None = None,
    pings: Mapping[str, float] | None = None,
    moves: Moves = Moves.NEVER,
) -> ServerInfo:
    """What the server says of itself; neither measured nor with a cache while it joins.

    Args:
        blocks: the hosted range.
        digest: of its checkpoint.
        engine: how its steps run.
        quantised: what was done to its weights; None: nothing.
        pings: round trips in seconds to the servers of neighbouring blocks.
        moves: how it goes to other blocks.
    """
    packed: dict[str, Any] = {"quant_type": "none"}
    if quantised is not None:
        packed = {
            "quant_type": "int8" if quantised.bits > INT8_BITS else "int4",
            "weight_bits": round(quantised.bits, 2),
            "weight_error": quantised.error,
            "weight_perplexity": quantised.perplexity,
            "packing": quantised.packing,
        }
    return ServerInfo(
        state=state,
        throughput=rates.of_span(blocks[1] - blocks[0]) if rates else 0.0,
        start_block=blocks[0],
        end_block=blocks[1],
        public_name=options.name,
        version=__version__,
        inference_rps=rates.inference_rps if rates else None,
        forward_rps=rates.forward_rps if rates else None,
        part_tokens=rates.part_tokens if rates else None,
        engine=engine[:MAX_WORDS] if engine else None,
        reproducible=options.reproducible or None,
        moves=int(moves) or None,
        torch_dtype=options.dtype,
        using_relay=False,
        next_pings=dict(pings) if pings else None,
        cache_tokens_left=to_petals_tokens(pool.free, blocks[1] - blocks[0]) if pool else None,
        cache_tokens_total=pool.total if pool else None,
        swarm_notebook=protocol.PROTOCOL_VERSION,
        digest=digest,
        **packed,
    )


class Announcer:
    """Keeps the records of the blocks ``[start, end)`` of model ``prefix`` fresh.

    Args:
        node: this server's peer.
        prefix: the model's name in the DHT.
        blocks: the hosted range.
        model: the model's entry in the index.
        period: seconds between announcements.

    Attributes:
        latest: what was announced last, for those who ask this server itself and not the DHT: the
            ``record``, until when it holds (``record_expires``), and the ``model`` in the index.
    """

    def __init__(
        self, node: Node, prefix: str, blocks: tuple[int, int], model: ModelRecord, period: float
    ):
        self._node, self._prefix, self._model = node, prefix, model
        self._period = min(period, MAX_SECONDS / 2)  # nobody keeps a record for longer than that
        self._uids = [protocol.block_uid(prefix, index) for index in range(*blocks)]
        self._task: asyncio.Task[None] | None = None
        self._due = asyncio.Event()
        self.latest: dict[str, Any] = {}

    async def announce(self, info: ServerInfo) -> bool:
        """Store the record under every block; whether all were stored."""
        expiration = get_dht_time() + max(2 * self._period, MIN_EXPIRATION)
        keys, subkeys = list(self._uids), [self._node.peer_id.to_base58()] * len(self._uids)
        member = self._node.membership
        shown = member.shown if member is not None else None
        about = info.model_copy(update={"model": self._prefix, "member": shown})
        record = signed_record(about, self._node.identity, expiration)
        self.latest = {
            "record": record,
            "record_expires": expiration,
            "model": self._model.model_dump(),
        }
        values: list[object] = [record] * len(self._uids)
        if not self._prefix.startswith("_"):
            keys.append(MODEL_INDEX_KEY)
            subkeys.append(self._prefix)
            values.append(self._model.model_dump())
        stored = await self._node.dht.store_many(keys, values, expiration, subkeys=subkeys)
        # The index entry may be another server's, and newer: only our own records count.
        failed = [uid for uid in self._uids if not stored[uid, subkeys[0]]]
        if failed:
            logger.warning("could not announce %s; trying again later", ", ".join(failed[:3]))
        return not failed

    def soon(self) -> None:
        """Announce at once what is due within the period."""
        self._due.set()

    def keep(self, describe: Callable[[], Awaitable[ServerInfo]]) -> None:
        """From now on announce what ``describe`` says, once per period."""
        self._task = asyncio.create_task(self._keep(describe))

    async def beside(self, work: Awaitable[_T], info: ServerInfo) -> _T:
        """Keep announcing ``info`` while blocks load, which may take minutes: who chooses meanwhile
        is to know of them.
        """

        async def still() -> ServerInfo:
            return info

        self.keep(still)
        done = await work
        await self.cancel()
        return done

    async def stop(self, info: ServerInfo) -> None:
        """Announce a last record (offline) and stop."""
        await self.cancel()
        await self.announce(info)

    async def cancel(self) -> None:
        """Announce nothing more; what was announced expires."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self, describe: Callable[[], Awaitable[ServerInfo]]) -> None:
        stored = True
        while True:
            pause = self._period if stored else min(self._period, RETRY_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), pause)
            self._due.clear()
            try:
                stored = await self.announce(await describe())
            except Exception:
                stored = False
                # Whatever it was, the next round may succeed, and the requests go on.
                logger.exception("announcing %s failed; trying again later", self._prefix)
