"""One server's part of a session: a long-lived inference stream, a request and an answer per step.

The stream is opened by the first request. Whatever goes wrong on it (the peer is gone, hangs,
answers with something else than asked for) comes out as one of the errors of `RemoteError`.
"""

from __future__ import annotations

import asyncio
import functools
import time
import uuid

from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from swarm_notebook.client.adapters import ensure_uploaded
from swarm_notebook.client.directory import Directory
from swarm_notebook.client.events import HopTimes
from swarm_notebook.client.request import (
    Outputs,
    Request,
    read_outputs,
    read_times,
    refuse_extensions,
)
from swarm_notebook.client.routing import Leg
from swarm_notebook.client.trip import OPEN_TIMEOUT, TRANSPORT_ERRORS, gone, server_name
from swarm_notebook.client.watch import Watch
from swarm_notebook.errors import ServerFailed
from swarm_notebook.net import protocol, streams

ALLOC_TIMEOUT = 10.0


class Hop:
    """The server of blocks ``[start, end)`` in one session."""

    def __init__(self, leg: Leg, directory: Directory, max_length: int, rows_version: int):
        self.leg, self.start, self.end = leg, leg.start, leg.end
        self._name = server_name(leg)
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
        return self._name

    async def run(self, request: Request) -> tuple[Outputs, HopTimes]:
        """Send one request and wait for its outputs; also say where the time went.

        Raises:
            BadRequest, CacheFull, SessionLost, AdapterMissing, ShuttingDown: the server says so.
            ServerFailed: it is gone, hangs, or answers with something else than asked for.
        """
        await ensure_uploaded(self._directory, self.leg, request.adapter)
        began = time.perf_counter()
        message = self._message(request)
        watch: Watch | None = None
        try:
            if self._stream is None:
                async with asyncio.timeout(OPEN_TIMEOUT):
                    self._stream = await streams.open_stream(
                        self._directory.node.p2p,
                        PeerID.from_base58(self.leg.peer),
                        protocol.RPC_INFERENCE,
                        self._directory.events.ledger.open(self.leg),
                    )
            what = functools.partial(self._describe, request)
            watch = Watch(self._directory, self.leg.peer, what, self._stream)
            sent = time.perf_counter()
            with watch:
                await self._stream.send(message)
                answer = await self._stream.receive(runtime_pb2.ExpertResponse)
        except TRANSPORT_ERRORS as error:
            verdict = watch.verdict if watch else ""
            raise ServerFailed(f"{self} {verdict or gone(error)}") from None
        except streams.BadFrame as error:
            raise ServerFailed(f"{self} sent no readable answer: {error}") from None
        if answer is None:
            raise ServerFailed(f"{self} ended the session")
        received = time.perf_counter()
        outputs = read_outputs(answer.tensors, request, str(self))
        self.position = request.position + request.hidden.shape[1]
        self._directory.succeeded(self.leg.peer)
        waited = received - sent
        serialisation, queue, compute = read_times(answer.metadata, waited)
        times = HopTimes(
            self.leg.peer,
            self.leg.span.name,
            request.start,
            request.end,
            serialisation + sent - began + time.perf_counter() - received,
            waited - serialisation - queue - compute,
            queue,
            compute,
        )
        return outputs, times

    def _describe(self, request: Request) -> str:
        return f"{self} to run {request.hidden.shape[1]} tokens"

    def close(self) -> None:
        """End the session on the server; the broken stream frees its cache there."""
        if self._stream is not None:
            self._stream.abort()
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
        metadata.update(request.options())
        extended = self.leg.span.extended
        blocks = (request.start, request.end)
        uid = ""
        if not extended or self._named != blocks:
            uid = protocol.uid_chain(self._directory.prefix, *blocks)
            self._named = blocks
        slots = [request.hidden, request.prompts, request.rows, request.mask, request.position_ids]
        return runtime_pb2.ExpertRequest(
            uid=uid,
            tensors=protocol.pack_slots(slots),
            metadata=protocol.pack_metadata(metadata),
        )
