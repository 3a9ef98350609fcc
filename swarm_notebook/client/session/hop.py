"""One server's part of a session: a long-lived inference stream, a request and an answer per step.

Whatever goes wrong on the stream (the peer is gone, hangs, answers with something else than asked
for) comes out as one of the errors of `RemoteError`.

The hidden states of a step travel with its request, or come from the server before, which is then
told to push them (`StepRoute`). Every server answers to the client in both cases: so it knows who
has done its part, and has what a lost cache is rebuilt from.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from swarm_notebook.client.adapters import Adapter, ensure_uploaded
from swarm_notebook.client.passes.call import OPEN_TIMEOUT, TRANSPORT_ERRORS, gone, server_name
from swarm_notebook.client.request import Outputs, Request, ServerReport, read_outputs, read_report
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.client.session.steps import StepRoute, StepWriter, new_step_id
from swarm_notebook.client.telemetry import HopTimes
from swarm_notebook.client.watch import Watch
from swarm_notebook.errors import ServerFailed
from swarm_notebook.net import protocol, streams


@dataclass(slots=True)
class Answer:
    """What a server answered to a step.

    Attributes:
        report: what the server says besides.
        received: when it came.
        since: when the answer before it came; until then the server had other work of this session.
    """

    outputs: Outputs
    report: ServerReport
    received: float
    since: float


class Hop:
    """The server of blocks ``[start, end)`` in one session.

    Attributes:
        position: tokens in the server's cache.
        rows_version: how many of the session's row selections it followed.
        sending, receiving: held by the step that is just sent or answered, so that the parts of
            a long one keep their order.
    """

    def __init__(
        self, segment: RouteSegment, directory: Directory, max_length: int, rows_version: int
    ):
        self.segment, self.start, self.end = segment, segment.start, segment.end
        self._name = server_name(segment)
        self._directory = directory
        self._max_length = max_length
        self._stream: streams.Stream | None = None
        self.sending, self.receiving = asyncio.Lock(), asyncio.Lock()
        self.reset(rows_version)

    def reset(self, rows_version: int) -> None:
        """Begin anew with an empty cache on the same server."""
        self.close()
        self.position = 0
        self.rows_version = rows_version
        # Steps that were sent and not answered yet.
        self._owed: deque[tuple[Request, StepRoute]] = deque()
        self._answered = 0.0
        self._writer = StepWriter(self.segment, self._directory, self._max_length)

    def __str__(self) -> str:
        return self._name

    @property
    def session_id(self) -> str:
        """The session's name on the server."""
        return self._writer.session_id

    @property
    def owes(self) -> bool:
        """Whether steps were sent that are not answered yet."""
        return bool(self._owed)

    async def run(self, request: Request) -> tuple[Outputs, HopTimes]:
        """Send one request and wait for its outputs; also say where the time went.

        Raises: as `receive`.
        """
        await self.prepare(request.adapter)
        began = time.perf_counter()
        packed = await self.send(request, StepRoute(new_step_id()))
        answer = await self.receive(request)
        return answer.outputs, self.times(request, answer, began, packed)

    def prepared(self, adapter: Adapter | None) -> bool:
        """Whether `prepare` would have nothing to do."""
        return self._stream is not None and adapter is None

    async def prepare(self, adapter: Adapter | None) -> None:
        """Open the stream, and bring the adapter there, before a step is sent."""
        await ensure_uploaded(self._directory, self.segment, adapter)
        if self._stream is None:
            with self._blamed():
                async with asyncio.timeout(OPEN_TIMEOUT):
                    self._stream = await streams.open_stream(
                        self._directory.node.p2p,
                        PeerID.from_base58(self.segment.peer),
                        protocol.RPC_INFERENCE,
                        self._directory.events.ledger.open(self.segment),
                    )

    async def send(self, request: Request, way: StepRoute) -> float:
        """Send one step (`prepare` came before); the moment when it was packed."""
        message = self._writer.write(request, way)
        packed = time.perf_counter()
        self._owed.append((request, way))
        self.rows_version = request.rows_version
        with self._blamed(), self._watch(request) as stream:
            await stream.send(message)
        return packed

    async def resend(self, request: Request, way: StepRoute) -> None:
        """Send the hidden states of a step after all, which should have been pushed."""
        message = self._writer.write(request, StepRoute(way.step_id, None, way.push_to), again=True)
        with self._blamed(), self._watch(request) as stream:
            await stream.send(message)

    async def settle(self) -> None:
        """Give up the steps that wait for what a lost server was to push; the cache is kept.

        In place of what has not begun yet, the server is sent a step without tokens. The answers
        are of no use: some may come of what the lost server has pushed. The same positions are to
        be sent again, which rolls the cache back to where the first of these steps began.

        Raises: as `receive`; then the cache is lost.
        """
        first = self._owed[0][0]
        with self._blamed(), self._watch(first) as stream:
            # From the last one on: so none begins after one that has been given up.
            for request, way in reversed(self._owed):
                if way.push_from is not None:
                    nothing = request.without_tokens(first.position)
                    await stream.send(
                        self._writer.write(nothing, StepRoute(way.step_id), again=True)
                    )
            while self._owed:
                await self._next_answer(stream)
        self.position = first.position

    async def receive(
        self, request: Request, nudge: Callable[[], Awaitable[None]] | None = None
    ) -> Answer:
        """The answer to the step that was sent first of those without one.

        Args:
            request: the step.
            nudge: called once if the answer takes longer than a moment.

        Raises:
            BadRequest, CacheFull, SessionLost, AdapterMissing, ShuttingDown: the server says so.
            ServerFailed: it is gone, hangs, or answers with something else than asked for.
        """
        with self._blamed(), self._watch(request, nudge) as stream:
            answer = await self._next_answer(stream)
        received = time.perf_counter()
        since, self._answered = self._answered, received
        outputs = read_outputs(answer.tensors, request, str(self))
        self.position = request.position + request.hidden.shape[1]
        self._directory.succeeded(self.segment.peer)
        self._directory.events.ledger.received(self.segment)
        return Answer(outputs, read_report(answer.metadata), received, since)

    async def _next_answer(self, stream: streams.Stream) -> runtime_pb2.ExpertResponse:
        answer = await stream.receive(runtime_pb2.ExpertResponse)
        if answer is None:
            raise ServerFailed(f"{self} ended the session")
        self._owed.popleft()
        return answer

    def times(self, request: Request, answer: Answer, began: float, packed: float) -> HopTimes:
        """Where the time of a step went: packed from ``began`` to ``packed``, then answered.

        The parts of a long prompt wait for the server together, and are not counted while they do.
        """
        waited = max(answer.received - max(packed, answer.since), 0.0)
        serialisation, queue, compute = answer.report.times_within(waited)
        return HopTimes(
            self.segment.peer,
            self.segment.span.name,
            request.start,
            request.end,
            serialisation + packed - began + time.perf_counter() - answer.received,
            max(waited - serialisation - queue - compute, 0.0),
            queue,
            compute,
        )

    def close(self) -> None:
        """End the session on the server; the broken stream frees its cache there."""
        if self._stream is not None:
            self._stream.abort()
            self._stream = None

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """What the transport raises is this server's failure."""
        try:
            yield
        except TRANSPORT_ERRORS as error:
            raise ServerFailed(f"{self} {gone(error)}") from None
        except streams.BadFrame as error:
            raise ServerFailed(f"{self} sent no readable answer: {error}") from None

    @contextlib.contextmanager
    def _watch(
        self, request: Request, nudge: Callable[[], Awaitable[None]] | None = None
    ) -> Iterator[streams.Stream]:
        """The open stream, watched while something is waited for on it."""
        stream = self._stream
        if stream is None:
            raise ServerFailed(f"{self} has ended the session")

        def what() -> str:
            return f"{self} to run {request.hidden.shape[1]} tokens"

        watch = Watch(self._directory, self.segment.peer, what, stream, nudge)
        try:
            with watch:
                yield stream
        except TRANSPORT_ERRORS:
            if watch.verdict:
                raise ServerFailed(f"{self} {watch.verdict}") from None
            raise
