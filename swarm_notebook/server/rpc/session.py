"""One inference stream: reads a client's steps, runs them one after the other, answers each.

Two tasks per session: one reads frames ahead, so that a client that leaves (or breaks off with an
end frame) is noticed while its step still waits or computes; the other works on the steps. The
session ends when the client says so or is gone, when a step fails, when its memory is given to
others (`SessionLost`) or when the server leaves (`ShuttingDown`, after the step in flight). In
every case the memory is given back as soon as the torch thread has let go of it.

A short step is computed together with those of other sessions (`steps.batching`). A long prefill is
computed in chunks, so that the steps of other sessions come in between and a client that leaves
stops it. Large tensors are packed and unpacked beside the event loop (`codec`).

A session may begin with a copy of the cache of another one of its client, if that has done nothing
since the step that the client names: else it is `SessionLost`, as a cache is that others needed.

A client that does not read its answers holds up nobody but itself, and is gone after a while.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import Any

import torch

from swarm_notebook.errors import BadRequest, SessionLost, ShuttingDown, SwarmError
from swarm_notebook.net.wire import hand_overs, prints, protocol
from swarm_notebook.net.wire.hand_overs import PushedStep, Signed
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.streams import Stream
from swarm_notebook.net.wire.traffic import COPIES
from swarm_notebook.server.engine.kv.budget import CachePool
from swarm_notebook.server.engine.requests import Limits, Step, StepTimes
from swarm_notebook.server.engine.scheduling.scheduler import Kind, Task
from swarm_notebook.server.engine.scheduling.worker import ComputeThread, Job
from swarm_notebook.server.engine.steps.batching import FIXED_CHUNK, SHORT_TOKENS, Batching
from swarm_notebook.server.engine.steps.prefill import ChunkedPrefill
from swarm_notebook.server.engine.steps.session_state import BatchItem, SessionState, run_one
from swarm_notebook.server.rpc import fields
from swarm_notebook.server.rpc.answers import allow_answer
from swarm_notebook.server.rpc.codec import Codec
from swarm_notebook.server.rpc.counters import Counters
from swarm_notebook.server.rpc.inbox import Inbox
from swarm_notebook.server.rpc.parse import StepMessage, parse_step
from swarm_notebook.server.rpc.push import PushChannel

# Seconds to wait for cache memory when the client does not say, and for it to read an answer.
ALLOC_TIMEOUT = 10.0
UNREAD_SECONDS = 60.0
# Of the latest steps of a session: more parts of a long prompt are not under way at once.
MAX_PROOFS = 64

_PROVES = protocol.PROVE.encode()


class ServerSession:
    """A client's session on one stream; `run` lasts as long as it does.

    Args:
        others: all sessions on this server.
    """

    def __init__(
        self,
        stream: Stream,
        state: SessionState,
        limits: Limits,
        pool: CachePool,
        compute: ComputeThread,
        *,
        batching: Batching,
        pushes: PushChannel,
        counters: Counters,
        codec: Codec,
        others: Collection[ServerSession],
    ):
        self._stream, self._limits, self._others = stream, limits, others
        self._batching, self._pushes, self._counters = batching, pushes, counters
        self._pool, self._compute, self._codec = pool, compute, codec
        self._state: SessionState | None = state
        self._reservation = pool.open(self._drop, stream.peer)
        self._inbox = Inbox(pushes, stream.max_frame, self._may_hold)
        # Bytes of messages that are neither in the inbox nor done: just read, and being worked on.
        self._read_bytes = self._step_bytes = 0
        self._answer_bytes = 0
        self._ended: asyncio.Future[SwarmError] = asyncio.get_running_loop().create_future()
        self._blocks: tuple[int, int] | None = None
        self._step_id: str | None = None
        self._job: Job | None = None
        self._leaving = False
        self._proofs: OrderedDict[str, Signed] = OrderedDict()

    async def run(self) -> None:
        """Serve the session until it ends.

        Raises:
            RemoteError: why the session ends; the client gets it as an error frame.
            StreamClosed: the client is gone.
        """
        tasks: list[asyncio.Task[None]] = [
            asyncio.create_task(self._read()),
            asyncio.create_task(self._work()),
        ]
        endings: list[asyncio.Future[Any]] = [*tasks, self._ended]
        try:
            await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                raise self._ended.result()
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._ended.cancel()
            self._inbox.close()
            self._release()
            # What is raised here knows this frame, and a task knows what it has raised: a circle
            # that would hold the whole session until the garbage collector comes by.
            del tasks, endings, task

    @property
    def busy(self) -> bool:
        return self._reservation.busy

    def state_behind(self, peer: str, session_id: str, step_id: str) -> SessionState | None:
        """What is in the session, if it has this name and owner and is at rest behind this step."""
        named = self._stream.peer == peer and self._inbox.session_id == session_id
        return self._state if named and self._step_id == step_id and not self.busy else None

    def leave(self) -> None:
        """The server shuts down: end now, or after the step in flight."""
        self._leaving = True
        if not self._reservation.busy:
            self._end(ShuttingDown("the server is leaving the swarm, go on with another one"))

    def _may_hold(self, size: int) -> bool:
        """Take room for what other servers push."""
        return self._stream.account.try_take(COPIES * size)

    def _settle(self) -> None:
        """Count what is here now."""
        messages = self._inbox.bytes + self._read_bytes + self._step_bytes
        held = COPIES * messages + self._answer_bytes + self._stream.arriving
        self._stream.account.resize(held)

    def _drop(self) -> None:
        """The pool takes the memory; where a step is in flight, `run` gives it back after that."""
        if self._state is not None and not self.busy:
            self._state.cache.release()
            self._state = None
        self._end(
            SessionLost(
                "others needed the memory of this session, which was idle or beyond its client's "
                "share; send its history again"
            )
        )

    def _end(self, error: SwarmError) -> None:
        if not self._ended.done():
            self._ended.set_result(error)

    async def _read(self) -> None:
        while True:
            message = await self._stream.receive()
            if message is None or not (message.uid or message.tensors):
                return
            self._read_bytes = self._stream.size
            await self._inbox.put(message, self._read_bytes)
            self._read_bytes = 0
            self._settle()

    async def _work(self) -> None:
        while True:
            message, self._step_bytes = await self._inbox.get()
            self._pool.begin(self._reservation)
            try:
                answer = self._proof(message) or await self._step(message)
            finally:
                self._pool.end(self._reservation)
            if answer is not None:
                await self._stream.answer(answer, UNREAD_SECONDS)
            del message, answer
            self._step_bytes = self._answer_bytes = 0
            self._settle()
            if self._leaving:
                self.leave()

    async def _step(self, message: PackedMessage) -> PackedMessage | None:
        """Check a step, find room for it, compute it; None if there is nothing to answer."""
        times = StepTimes()
        parsed = await self._codec.run(
            self._step_bytes, parse_step, message, self._blocks, self._limits, times
        )
        step = parsed.step
        if parsed.step_id is not None and parsed.step_id == self._step_id:
            return None  # Petals sends a step twice, directly and through the server before
        state = self._state
        if state is None:
            return None  # the session has just been dropped, `run` says so
        if parsed.copy_of is not None:
            await self._begin_as_copy(state, parsed)
        position = state.check(step)
        self._answer_bytes = await allow_answer(self._stream.account, step)
        await self._make_room(state, step.rows, state.needs(step, position), parsed)
        # Before the step: blocks may write over what they are given.
        told = await self._whence(parsed, message.tensors[0])
        outputs = await self._run(state, step, position)
        self._blocks, self._step_id = step.blocks, parsed.step_id
        self._counters.count(step)
        step.times.computed()
        wanted = outputs
        if step.last is not None and step.last < outputs[0].shape[1]:
            wanted = [outputs[0][:, outputs[0].shape[1] - step.last :], *outputs[1:]]
        packed = await self._codec.pack(wanted, parsed.compression)
        told[protocol.TIMES_KEY] = step.times.parts()
        if parsed.push_to is not None and parsed.step_id is not None:
            whole = packed[0]
            if wanted is not outputs:
                (whole,) = await self._codec.pack(outputs[:1], parsed.compression)
            client = self._stream.peer
            failed = await self._pushes.push(*parsed.push_to, parsed.step_id, whole, client)
            if failed:
                told[protocol.PUSH_FAILED] = failed
            # The server that is next waits for all that shared a call: their pushes leave before
            # the clients' answers, which nobody waits for.
            await asyncio.sleep(0)
        metadata = protocol.pack_metadata(told)
        return PackedMessage(tensors=packed, metadata=metadata)

    async def _whence(self, parsed: StepMessage, given: PackedTensor) -> dict[str, Any]:
        """What is to be said of where the input of a step came from; keeps the proof of it.

        Raises:
            BadRequest: the server that has pushed it has not signed it.
        """
        if self._inbox.filled:
            return {protocol.FILLED: True}
        claim, seed = self._inbox.claim, parsed.print_seed
        if claim is None or seed is None:
            return {}
        size = self._step_bytes
        step = PushedStep(self._stream.peer, self._inbox.session_id or "", parsed.step_id or "")
        told = {protocol.PRINT: await self._codec.run(size, prints.printer(seed).of, given)}
        signed = await self._codec.run(size, hand_overs.checked, claim, step, given)
        if signed is None:
            raise BadRequest(f"{claim.sender} has not signed what it has pushed for this step")
        self._proofs[step.step_id] = signed
        if len(self._proofs) > MAX_PROOFS:
            self._proofs.popitem(last=False)
        return told

    def _proof(self, message: PackedMessage) -> PackedMessage | None:
        """What was pushed to another session of the client for a step, if that is asked."""
        if _PROVES not in message.metadata:
            return None
        metadata = protocol.unpack_metadata(message.metadata)
        if protocol.PROVE not in metadata:
            return None
        session_id, step_id = fields.session_and_step(metadata, protocol.PROVE)
        told: dict[str, Any] = {}
        for one in self._others:
            if one._stream.peer == self._stream.peer and one._inbox.session_id == session_id:
                found = one._proofs.get(step_id)
                if found is not None:
                    told[protocol.PROOF] = found.digest, found.signature, found.key
        return PackedMessage(metadata=protocol.pack_metadata(told))

    async def _make_room(
        self, state: SessionState, rows: int, needed: tuple[int, int] | None, parsed: StepMessage
    ) -> None:
        """Wait for cache memory, preferred and needed in tokens, if any is needed."""
        if needed is not None:
            wait = ALLOC_TIMEOUT if parsed.alloc_timeout is None else parsed.alloc_timeout
            granted = await self._pool.resize(self._reservation, *needed, wait)
            state.cache.reserve(granted // rows)

    async def _begin_as_copy(self, state: SessionState, parsed: StepMessage) -> None:
        """Have a copy of what another session of the client holds before the step.

        Raises:
            SessionLost: it is not there, or was changed while it was copied.
            CacheFull, ServerBusy: there is no room for the copy.
        """
        step, peer, source = parsed.step, self._stream.peer, parsed.copy_of or ("", "")
        length = step.position or 0

        def found() -> SessionState | None:
            states = (one.state_behind(peer, *source) for one in self._others)
            return next((one for one in states if one is not None), None)

        theirs = found()
        if theirs is not None and min(theirs.cache.lengths(*step.blocks)) >= length:
            rows = theirs.cache.rows
            await self._make_room(state, rows, state.room(rows, length + step.length), parsed)
            task = Task(Kind.STATELESS, peer)
            await self._submit(state.copy_from, theirs, length, task=task)
            if found() is theirs:
                return
        raise SessionLost("the session to be copied has ended or gone on, send its history again")

    async def _run(self, state: SessionState, step: Step, position: int) -> list[torch.Tensor]:
        if step.rows * step.length <= SHORT_TOKENS:
            return await self._run_whole(state, step, position)
        prefill = ChunkedPrefill(state, step, position)
        while not prefill.finished:
            # What a module inside of a block puts out may not be cut by positions.
            tokens = self._compute.chunk_tokens(self._stream.peer)
            size = (FIXED_CHUNK if self._batching.alone else tokens) // step.rows
            size = step.length if step.inner else size
            size = min(max(1, size), step.length - prefill.computed)
            task = self._task(Kind.PREFILL_CHUNK, step, step.rows * size)
            await self._submit(prefill.run, size, task=task)
        return prefill.outputs

    async def _run_whole(
        self, state: SessionState, step: Step, position: int
    ) -> list[torch.Tensor]:
        task = self._task(
            Kind.STEP, step, step.rows * step.length, self._batching.group(step, position)
        )
        item = BatchItem(state, step, position, 0, step.length)
        outputs: list[torch.Tensor] = await self._submit(
            run_one, item, task=task, run_batch=self._batching.run
        )
        return outputs

    def _task(self, kind: Kind, step: Step, tokens: int, group: Hashable | None = None) -> Task:
        blocks = step.blocks[1] - step.blocks[0] if step.length else 0
        return Task(kind, self._stream.peer, tokens, group, blocks, id(self))

    async def _submit(self, *call: Any, **options: Any) -> Any:
        self._job = self._compute.submit(*call, **options)
        result = await self._job.future
        # It knows the session's memory, which others may get before the next step comes.
        self._job = None
        return result

    def _release(self) -> None:
        """Give the memory back once the torch thread no longer writes to it."""
        if self._job is not None:
            self._job.cancel()
            self._job.on_settled(self._free)
        else:
            self._free()

    def _free(self) -> None:
        if self._state is not None:
            self._state.cache.release()
        self._state = self._job = None
        self._pool.close(self._reservation)
