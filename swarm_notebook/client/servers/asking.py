"""Asking a server what it is and does (rpc_info), which is a notebook's ping as well."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from google.protobuf.message import DecodeError
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import runtime_pb2

from swarm_notebook.errors import MAX_WIRE_TEXT, BadRequest, NotAMember, from_wire
from swarm_notebook.net.node import Node
from swarm_notebook.net.wire import protocol
from swarm_notebook.net.wire.opening import show
from swarm_notebook.net.wire.streams import TRANSPORT_ERRORS
from swarm_notebook.texts import clean

logger: logging.Logger = logging.getLogger(__name__)

# Ten times a round trip around the earth, and longer than a busy server's loop is held up.
PING_TIMEOUT = 3.0
# Peers that are asked at once what they serve.
MAX_ASKED = 64
# What a ping may meet: silence, refusal, or an answer that is none.
PING_ERRORS = (*TRANSPORT_ERRORS, BadRequest, NotAMember, DecodeError)


async def ask(node: Node, peer: str) -> dict[str, Any]:
    """A server's answer to rpc_info; room in the cache of ours is in tokens.

    Raises: `PING_ERRORS`.
    """
    # What is shown stands where a request has its metadata: an `ExpertUID` is the same without.
    request = (
        runtime_pb2.ExpertUID(uid="")
        if node.membership is None
        else runtime_pb2.ExpertRequest(metadata=show(node.membership))
    )
    try:
        answer = await node.p2p.call_protobuf_handler(
            PeerID.from_base58(peer), protocol.RPC_INFO, request, runtime_pb2.ExpertInfo
        )
    except P2PHandlerError as error:
        if str(error).startswith(f"{NotAMember.code}: "):
            raise from_wire(str(error), peer) from None
        raise
    found = protocol.unpack_metadata(answer.serialized_info)
    if "cache_tokens_free" in found:
        found["cache_tokens_available"] = found["cache_tokens_free"]
    return found


def said(error: Exception) -> str:
    """What a peer answered instead, of what `ask` has raised; empty if it did not answer."""
    if isinstance(error, (P2PHandlerError, BadRequest, NotAMember)):
        return f"it answers pings with: {clean(str(error)[:MAX_WIRE_TEXT])}"
    return "it answers pings with what nobody can read" if isinstance(error, DecodeError) else ""


async def try_ask(
    node: Node, peer: str, refused: list[NotAMember] | None = None
) -> dict[str, Any] | None:
    """`ask`, or None if no readable answer comes within `PING_TIMEOUT`.

    Args:
        refused: takes what a private swarm says to those who are not its members.
    """
    try:
        async with asyncio.timeout(PING_TIMEOUT):
            return await ask(node, peer)
    except PING_ERRORS as error:
        logger.debug("asking %s: %s", peer, error)
        if isinstance(error, NotAMember) and refused is not None:
            refused.append(error)
        return None
