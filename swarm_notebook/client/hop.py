"""One server's part of a session: a long-lived inference stream, a request and an answer per step.

The stream is opened by the first request. Whatever goes wrong on it (the peer is gone, hangs,
answers with something else than asked for) comes out as one of the errors of `RemoteError`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.proto import runtime_pb2

from swarm_notebook.client.directory import Directory
from swarm_notebook.client.routing import Leg, describe_blocks
from swarm_notebook.client.watch import Watch
from swarm_notebook.errors import BadRequest, ServerFailed, Unsupported
from swarm_notebook.net import protocol, streams, tensors
from swarm_notebook.net.records import ServerSpan

OPEN_TIMEOUT = 5.0
ALLOC_TIMEOUT = 10.0

TRANSPORT_ERRORS = (P2PDaemonError, P2PHandlerError, ControlFailure, OSError, TimeoutError)


@dataclass
class Request:
    """What one server is asked to compute in one trip.

    Attributes:
        hidden: ``[batch, length, hidden]``, the input of block `start`.
        position: how many tokens precede these in the server's cache.
        rows: which rows of the cache to continue, or None for all as they are.
        states: blocks of ``[start, end)`` whose outputs are wanted besides the last one's.
    """

    start: int
    end: int
    hidden: torch.Tensor
    position: int
    rows: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    states: Sequence[int] = ()


class Hop:
    """The server of blocks ``[start, end)`` in one session."""

    def __init__(self, leg: Leg, directory: Directory, max_length: int, rows_version: int):
        self.leg, self.start, self.end = leg, leg.start, leg.end
        self._directory = directory
        self._max_length = max_length
        self._stream: streams.Stream | None = None
        self.reset(rows_version)

    def reset(self, rows_version: int) -> None:
        """Begin anew with an empty cache on the same server."""
        self.close()
        # Tokens in the server's cache, and how many of the session's row selections it followed.
        self.position = 0
        self.rows_version = rows_version
        self._session_id = str(uuid.uuid4())
        self._named: tuple[int, int] | None = None

    def __str__(self) -> str:
        blocks = describe_blocks(range(self.start, self.end))
        return f"server {self.leg.span.name} ({blocks})"

    async def run(self, request: Request) -> dict[int, torch.Tensor]:
        """Send one request and wait for its outputs, by block; ``end - 1`` is always there.

        Raises:
            BadRequest, CacheFull, SessionLost, ShuttingDown: the server says so.
            ServerFailed: it is gone, hangs, or answers with something else than asked for.
        """
        message = self._message(request)
        watch: Watch | None = None
        try:
            if self._stream is None:
                async with asyncio.timeout(OPEN_TIMEOUT):
                    self._stream = await streams.open_stream(
                        self._directory.node.p2p,
                        PeerID.from_base58(self.leg.peer),
                        protocol.RPC_INFERENCE,
                    )
            watch = Watch(self._directory, self.leg.peer, self._describe(request), self._stream)
            with watch.running():
                await self._stream.send(message)
                answer = await self._stream.receive(runtime_pb2.ExpertResponse)
        except TRANSPORT_ERRORS as error:
            verdict = watch.verdict if watch else ""
            raise ServerFailed(f"{self} {verdict or f'is gone ({error})'}") from None
        if answer is None:
            raise ServerFailed(f"{self} ended the session")
        outputs = read_outputs(answer.tensors, request, str(self))
        self.position = request.position + request.hidden.shape[1]
        self._directory.succeeded(self.leg.peer)
        return outputs

    def _describe(self, request: Request) -> str:
        return f"{self} to run {request.hidden.shape[1]} tokens"

    def close(self) -> None:
        """End the session on the server; the broken stream frees its cache there."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _message(self, request: Request) -> runtime_pb2.ExpertRequest:
        metadata: dict = {
            "session_id": self._session_id,
            "step_id": str(uuid.uuid4()),
            "start_from_position": request.position,
        }
        if self._stream is None:
            metadata["max_length"] = self._max_length
            metadata["alloc_timeout"] = ALLOC_TIMEOUT
        refuse_extensions(self.leg.span, str(self), request)
        if request.states:
            metadata["states"] = list(request.states)
        extended = self.leg.span.extended
        blocks = (request.start, request.end)
        uid = ""
        if not extended or self._named != blocks:
            uid = protocol.uid_chain(self._directory.prefix, *blocks)
            self._named = blocks
        slots = [request.hidden, None, request.rows, request.mask, request.position_ids]
        return runtime_pb2.ExpertRequest(
            uid=uid,
            tensors=protocol.pack_slots(slots),
            metadata=protocol.pack_metadata(metadata),
        )


def refuse_extensions(span: ServerSpan, server: str, request: Request) -> None:
    """Against a plain Petals server, say what cannot work there (contract C6)."""
    wanted = {
        "padded batches (an attention mask)": request.mask is not None,
        "explicit position ids": request.position_ids is not None,
        "hooks on hidden states inside its span": bool(request.states),
    }
    for what, asked in wanted.items():
        if asked and not span.extended:
            raise Unsupported(
                f"{server} is a Petals server, which knows no {what}; use servers started "
                "with `swarm-notebook serve`, or do without"
            )


def read_outputs(
    packed: Sequence[runtime_pb2.Tensor], request: Request, server: str
) -> dict[int, torch.Tensor]:
    """The outputs in a server's answer, by block, in the shape and dtype of the request.

    Raises:
        ServerFailed: the server sent something else than was asked for.
    """
    blocks = [request.end - 1, *request.states]
    if len(packed) != len(blocks):
        raise ServerFailed(f"{server} sent {len(packed)} tensors, not {len(blocks)}")
    return {
        block: _read_output(tensor, request.hidden, server)
        for block, tensor in zip(blocks, packed, strict=True)
    }


def _read_output(packed: runtime_pb2.Tensor, hidden: torch.Tensor, server: str) -> torch.Tensor:
    try:
        output = tensors.unpack(packed)
    except BadRequest as error:
        raise ServerFailed(f"{server} sent no readable tensor: {error}") from None
    if output.shape != hidden.shape or not output.is_floating_point():
        raise ServerFailed(
            f"{server} sent a {output.dtype} tensor of shape {list(output.shape)} "
            f"for hidden states of shape {list(hidden.shape)}"
        )
    return output.to(hidden.dtype)
