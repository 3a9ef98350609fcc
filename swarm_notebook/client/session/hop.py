"""One server's part of a session: a long-lived inference stream, a request and an answer per step.

Whatever goes wrong on the stream (the peer is gone, hangs, answers with something else than asked
for) comes out as one of the errors of `RemoteError`.

The hidden states of a step go with its request, or come from the server before, which is then asked
to push them (`StepRoute`). Every server answers to the client in both cases: so it knows who
has done its part, and has what a lost cache is rebuilt from.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from swarm_notebook.client.adapters import Adapter, ensure_uploaded
from swarm_notebook.client.passes.call import ANSWER_SLACK, server_name
from swarm_notebook.client.request import (
    Outputs,
    Request,
    answer_bytes,
    beside_loop,
    read_outputs,
    read_proof,
    read_report,
)
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.client.session.answer import HopAnswer
from swarm_notebook.client.session.writer import StepRoute, StepWriter, new_step_id
from swarm_notebook.client.telemetry import HopTimes
from swarm_notebook.client.watch import Watch, open_stream, seconds_elsewhere
from swarm_notebook.errors import CacheFull, RemoteError, ServerFailed, ServerGone
from swarm_notebook.net.wire import hand_overs, prints, protocol, streams
from swarm_notebook.net.wire.hand_overs import Signed
from swarm_notebook.net.wire.message import PackedMessage

# How Petals' servers end a refusal: with the most tokens that a session may reserve.
_LIMIT = re.compile(r"max = (\d{1,9})$")


@dataclass(eq=False)
class CopySource:
    """A session on the same server, with whose cache another one is to begin.

    Attributes:
        length: tokens that were in its cache.
        intact: whether these are still what they were.
    """

    hop: Hop
    session_id: str
    length: int
    intact: bool = True

    def holds(self, length: int) -> bool:
        """Whether so many tokens can still be copied from there."""
        open_ = self.hop._stream is not None and self.hop.session_id == self.session_id
        return open_ and self.intact and length <= self.length


class Hop:
    """The server of blocks ``[start, end)`` in one session.

    Attributes:
        position: tokens in the server's cache.
        rows_version: how many of the session's row selections the cache followed; None while there
            is none, which has no rows to select.
        counted: tokens that were sent; a Petals server takes each for a further one, also where it
            is told the place of one that came before (``start_from_position`` is not in a release).
        rows: those of its cache; a Petals server keeps to them.
        sending, receiving: held by the step that is just sent or answered, so that the parts of
            a long one keep their order.
    """

    segment: RouteSegment
    start: int
    end: int
    sending: asyncio.Lock
    receiving: asyncio.Lock
    position: int
    counted: int
    rows: int

    def __init__(self, segment: RouteSegment, directory: Directory, max_length: int):
        self.segment, self.start, self.end = segment, segment.start, segment.end
        self._name = server_name(segment)
        self._directory = directory
        self._max_length, self._needed = max_length, 0
        self._stream: streams.Stream | None = None
        self.sending, self.receiving = asyncio.Lock(), asyncio.Lock()
        self._changing = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin anew with an empty cache on the same server."""
        self.close()
        with self._changing:
            self.position = self.counted = self.rows = 0
            self.rows_version: int | None = None
            # Steps that were sent and not answered yet.
            self._owed: deque[tuple[Request, StepRoute]] = deque()
            self._answered = 0.0
            self._source: CopySource | None = None
            self._copies: list[weakref.ref[CopySource]] = []
            self._last_step = ""
            self._writer = StepWriter(self.segment, self._directory, self._max_length)

    def reserve(self, tokens: int) -> None:
        """See to room for so many tokens per sequence, those in the cache included.

        Our servers find it as they need it. A Petals server keeps to what the first step reserved:
        when that is not enough, the cache is left for an empty one of at least twice the size.
        """
        self._needed = tokens
        if not self.segment.span.extended and tokens > self._max_length:
            self._max_length = max(tokens, 2 * self._max_length)
            self.reset()

    def goes_on_from(self, position: int, rows: int) -> bool:
        """Whether a step of so many rows from there is one that the server's cache is ready for."""
        if self._source is not None and not self._source.holds(position):
            return False
        if self.segment.span.extended:
            return self.position >= position
        return self.counted == position and self.rows in (0, rows)

    def copied(self) -> Hop | None:
        """The hop of another session, that begins with what is in this one's cache.

        None if the server makes no copies, or there is nothing to copy. In any thread: the copy is
        made on the server when the hop is used.
        """
        origin = self if self._source is None else self._source.hop
        with origin._changing:
            length = self.position
            lost = origin._stream is None or not (
                self._source is None or self._source.holds(length)
            )
            if lost or not length or not self.segment.span.copies:
                return None
            twin = Hop(self.segment, self._directory, self._max_length)
            twin.position, twin.counted, twin.rows = length, self.counted, self.rows
            twin.rows_version = self.rows_version
            twin._source = CopySource(origin, origin.session_id, length)
            origin._copies.append(weakref.ref(twin._source))
        return twin

    def _change(self, request: Request) -> None:
        """Note what a step that is sent leaves of the cache, for those who are still to copy it."""
        with self._changing:
            self.position = min(self.position, request.position)
            waiting = [(one, source) for one in self._copies if (source := one()) is not None]
            for _, source in waiting:
                source.intact = request.position >= source.length and request.rows is None
            self._copies = [one for one, source in waiting if source.intact]

    def content_with_less(self, error: RemoteError) -> bool:
        """After a refusal: if the server would reserve less, and that is enough, begin anew so."""
        found = _LIMIT.search(str(error)) if isinstance(error, CacheFull) else None
        if found is None or not self._needed <= int(found[1]) < self._max_length:
            return False
        self._max_length = int(found[1])
        self.reset()
        return True

    def __str__(self) -> str:
        return self._name

    @property
    def session_id(self) -> str:
        return self._writer.session_id

    @property
    def print_seed(self) -> bytes | None:
        """By which the server says what was pushed to it; None if it does not."""
        return self._writer.print_seed

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
        return answer.outputs, answer.times(self.segment, request, began, packed)

    def prepared(self, adapter: Adapter | None) -> bool:
        """Whether `prepare` would have nothing to do."""
        return self._stream is not None and adapter is None

    async def prepare(self, adapter: Adapter | None) -> None:
        """Open the stream, and bring the adapter there, before a step is sent."""
        await ensure_uploaded(self._directory, self.segment, adapter)
        if self._stream is None:
            meter = self._directory.telemetry.usage.open(self.segment)
            self._stream = await open_stream(
                self._directory, self.segment.peer, str(self), protocol.RPC_INFERENCE, meter
            )

    async def send(self, request: Request, route: StepRoute) -> float:
        """Send one step (`prepare` came before); the moment when it was packed."""
        self._change(request)
        if self._source is not None:
            self._writer.copy_of = self._source.session_id, self._source.hop._last_step
            self._source = None
        message = self._writer.write(request, route)
        self._last_step = route.step_id
        packed = time.perf_counter()
        self._owed.append((request, route))
        self.rows = request.hidden.shape[0]
        self.counted += request.hidden.shape[1]
        self.rows_version = request.rows_version
        # Whoever receives the answer watches.
        if self._stream is not None and self._stream.send_at_once(message):
            return packed
        with self._watch(request) as stream:
            await stream.send(message)
        return packed

    async def resend(self, request: Request, route: StepRoute) -> None:
        """Send the hidden states of a step after all, which should have been pushed."""
        message = self._writer.write(
            request, StepRoute(route.step_id, None, route.push_to), again=True
        )
        with self._watch(request) as stream:
            await stream.send(message)

    async def settle(self) -> None:
        """Give up the steps that wait for what a lost server was to push; the cache is kept.

        In place of what has not begun yet, the server is sent a step without tokens. The answers
        are of no use: some may come of what the lost server has pushed. The same positions are to
        be sent again, which rolls the cache back to where the first of these steps began.

        Raises: as `receive`; then the cache is lost.
        """
        first = self._owed[0][0]
        with self._watch(first) as stream:
            # From the last one on: so none begins after one that has been given up.
            for request, route in reversed(self._owed):
                if route.push_from is not None:
                    nothing = request.without_tokens(first.position)
                    await stream.send(
                        self._writer.write(nothing, StepRoute(route.step_id), again=True)
                    )
            while self._owed:
                await self._next_answer(stream)
                stream.account.close()
        self.position = first.position

    async def receive(
        self,
        request: Request,
        nudge: Callable[[], Awaitable[None]] | None = None,
        print_seed: bytes | None = None,
    ) -> HopAnswer:
        """The answer to the step that was sent first of those without one.

        Args:
            request: the step.
            nudge: called once if the answer takes longer than a moment.
            print_seed: of the answer's print; None for neither print nor digest.

        Raises:
            BadRequest, CacheFull, SessionLost, AdapterMissing, ShuttingDown: the server says so.
            ServerGone: it gives no sign of life.
            ServerFailed: it hangs, or answers with something else than asked for.
        """
        with self._watch(request, nudge) as stream:
            answer = await self._next_answer(stream)
        received = time.perf_counter()
        since, self._answered = self._answered, received

        def read() -> tuple[int | None, bytes, Outputs]:
            # The print first: what is read may be written over.
            told, digest = None, b""
            if print_seed is not None and answer.tensors:
                told = prints.printer(print_seed).of(answer.tensors[0])
                digest = hand_overs.digest(answer.tensors[0])
            return told, digest, read_outputs(answer.tensors, request, str(self))

        try:
            printed, digest, outputs = await beside_loop(stream.size, read)
        finally:
            stream.account.close()
        self.position = request.position + request.hidden.shape[1]
        self._directory.succeeded(self.segment.peer)
        self._directory.telemetry.usage.received(self.segment)
        report = read_report(answer.metadata)
        return HopAnswer(outputs, report, received, since, printed, digest)

    async def proof(self, request: Request, step_id: str) -> Signed | None:
        """What the server has to show for a step of this session that was pushed to it.

        Raises: as `receive`.
        """
        asking = Hop(self.segment, self._directory, self._max_length)
        try:
            await asking.prepare(None)
            with asking._watch(request) as stream:
                await stream.send(asking._writer.ask_for_proof(request, (self.session_id, step_id)))
                stream.max_frame = ANSWER_SLACK
                answer = await stream.receive()
        finally:
            asking.close()
        return None if answer is None else read_proof(answer.metadata)

    async def _next_answer(self, stream: streams.Stream) -> PackedMessage:
        stream.max_frame = answer_bytes(self._owed[0][0])
        answer = await stream.receive()
        if answer is None:
            raise ServerGone(f"{self} ended the session")
        self._owed.popleft()
        return answer

    def close(self) -> None:
        """End the session on the server; the broken stream frees its cache there."""
        if self._stream is not None:
            self._stream.abort()
            self._stream.account.close()
            self._stream = None

    @contextlib.contextmanager
    def _watch(
        self, request: Request, nudge: Callable[[], Awaitable[None]] | None = None
    ) -> Iterator[streams.Stream]:
        """The open stream, watched while something is waited for on it."""
        stream = self._stream
        if stream is None:
            raise ServerGone(f"{self} has ended the session")

        def what() -> str:
            return f"{self} to run {request.hidden.shape[1]} tokens"

        # What has come so far, and this, goes through another server's blocks then.
        rows, length, width = request.hidden.shape
        again = rows * (request.position + length)
        size = again * width * request.hidden.itemsize
        elsewhere = seconds_elsewhere(self.segment, again, size)
        watch = Watch(
            self._directory,
            self.segment.peer,
            str(self),
            what,
            stream.abort,
            elsewhere=elsewhere,
            nudge=nudge,
        )
        try:
            with watch:
                yield stream
        except streams.BadFrame as error:
            # Nothing behind it can be read: the other parts of a prompt are not to wait for that.
            stream.abort()
            raise ServerFailed(f"{self} sent no readable answer: {error}") from None
