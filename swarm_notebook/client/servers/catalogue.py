"""Which models a swarm serves: what its index lists, and what its servers say themselves.

Anybody can write into the index, and drown it. So the peers that are known are asked what they
serve; a model that the index alone lists counts if a server has signed that it holds its first
block, or if one that is said to hold it answers, and does not say that it serves another.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection
from typing import Any

from hivemind.utils import ValueWithExpiration

from swarm_notebook.client.servers.asking import MAX_ASKED, try_ask
from swarm_notebook.errors import NotAMember
from swarm_notebook.net.dht.records import (
    MODEL_INDEX_KEY,
    ModelRecord,
    announcements,
    is_member,
    parse_model_record,
    parse_record,
)
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire import protocol

# Models that are listed and of which a server is looked for; and how many are asked for each.
MAX_LISTED, MAX_SERVERS = 64, 2


async def served(node: Node) -> dict[str, ModelRecord]:
    """The models by DHT prefix."""
    found, stated = await asyncio.gather(
        node.dht.get(MODEL_INDEX_KEY, latest=True), _stated(node, node.neighbours()[:MAX_ASKED])
    )
    entries = found.value if found is not None and isinstance(found.value, dict) else {}
    named = (item for item in entries.items() if isinstance(item[0], str))
    listed = {
        prefix: record
        for prefix, entry in itertools.islice(named, MAX_LISTED)
        if (record := parse_model_record(entry.value)) is not None
    }
    doubtful = listed.keys() - stated.keys()
    confirmed = await _with_servers(node, doubtful)
    return {prefix: listed[prefix] for prefix in confirmed} | stated


async def _stated(node: Node, peers: Collection[str]) -> dict[str, ModelRecord]:
    """What peers say that they serve.

    Raises:
        NotAMember: nobody says anything, as the swarm is private.
    """
    refused: list[NotAMember] = []
    answers = await asyncio.gather(*(try_ask(node, peer, refused) for peer in peers))
    found = dict(
        model
        for peer, answer in zip(peers, answers, strict=True)
        if answer is not None and (model := _model_of(node, peer, answer)) is not None
    )
    if refused and not found:
        raise refused[0]
    return found


def _model_of(node: Node, peer: str, answer: dict[str, Any]) -> tuple[str, ModelRecord] | None:
    record, model = parse_record(answer.get("record")), parse_model_record(answer.get("model"))
    if record is None or not record.model or model is None:
        return None
    return (record.model, model) if is_member(node.membership, peer, record) else None


async def _with_servers(node: Node, prefixes: Collection[str]) -> list[str]:
    """Of these models those of whose first block some server answers."""
    uids = {prefix: protocol.block_uid(prefix, 0) for prefix in prefixes}
    found = await node.dht.get_many(list(uids.values()), sufficient_expiration_time=float("inf"))
    answers = await asyncio.gather(
        *(_served_by(node, prefix, found[uid]) for prefix, uid in uids.items())
    )
    return [prefix for prefix, served in zip(uids, answers, strict=True) if served]


async def _served_by(node: Node, prefix: str, found: ValueWithExpiration | None) -> bool:
    peers = []
    for one in announcements(found, prefix, node.membership):
        if one.signed:
            return True
        peers.append(one.peer)
    asked = peers[:MAX_SERVERS]
    answers = await asyncio.gather(*(try_ask(node, peer) for peer in asked))
    models = (
        _model_of(node, peer, answer)
        for peer, answer in zip(asked, answers, strict=True)
        if answer is not None
    )
    return any(model is None or model[0] == prefix for model in models)
