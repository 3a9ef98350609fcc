"""The steps of a session that have arrived and are not computed yet.

A client sends its steps in order. A step either brings its hidden states, or announces that the
server before will push them (`push`). An announced step waits for them at the head of the queue,
or for its client, which sends them itself under the same step id when the push fails or is late.
A client that gives up announced steps sends one without positions in the place of each, and gets
an answer for each as before: what is not begun then is not computed, and the session goes on.

What waits is bounded: when whole steps take as much as the largest request may, the client's
stream is not read on, and it feels the pressure. Below that the stream is always read, so that a
client that leaves is noticed, and the parts of its long prompt that still wait are not computed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import protocol
from swarm_notebook.net.wire.hand_overs import Claim
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.server.rpc import fields
from swarm_notebook.server.rpc.push import Arrived, PushChannel

# Steps of one session that may wait. Ours has as many in flight as its chain has servers.
MAX_WHOLE, MAX_ANNOUNCED = 64, 64

_ANNOUNCES = protocol.PUSH_FROM.encode()


class _Announced:
    """A step whose hidden states are still to come, by push or (`filled`) from the client."""

    __slots__ = (
        "arrived",
        "claim",
        "filled",
        "message",
        "size",
        "step_id",
        "tensor",
        "tensor_size",
    )

    arrived: Arrived

    def __init__(self, message: PackedMessage, size: int, step_id: str):
        self.message, self.size, self.step_id = message, size, step_id
        self.tensor: PackedTensor | None = None
        self.tensor_size = 0
        self.claim: Claim | None = None
        self.filled = False

    @property
    def bytes(self) -> int:
        return self.size + self.tensor_size


class Inbox:
    """The steps of one session, in order; belongs to the loop.

    Args:
        pushes: where those of other servers arrive.
        limit: how many bytes may wait, in whole steps and for announced ones.
        may_hold: whether so many more bytes that come from other servers may be held.

    Attributes:
        filled: the step that was taken out last had to be filled in by its client.
        claim: whose its input is said to be, if it was pushed.
        session_id: the session's name; None before its first step, "" if it has none.
    """

    filled: bool

    def __init__(self, pushes: PushChannel, limit: int, may_hold: Callable[[int], bool]):
        self._pushes, self._limit, self._may_hold = pushes, limit, may_hold
        self._held = 0
        self.filled = False
        self.claim: Claim | None = None
        self.session_id: str | None = None
        self._steps: deque[tuple[PackedMessage, int] | _Announced] = deque()
        self._announced: dict[str, tuple[str, _Announced]] = {}
        # The latest steps that may come a second time: announced ones that were taken out, and
        # all of a Petals client.
        self._known: deque[str] = deque(maxlen=MAX_ANNOUNCED)
        self._plain = False
        self._whole = self._whole_bytes = 0
        self._changed = asyncio.Event()

    @property
    def bytes(self) -> int:
        """All that waits here."""
        return self._held + self._whole_bytes

    async def put(self, message: PackedMessage, size: int) -> None:
        """Take a message of the client of ``size`` bytes; waits while too much waits already.

        Raises:
            BadRequest: an announcement is malformed, or there are too many.
        """
        if self.session_id is None:
            self._introduce(message)
        if _ANNOUNCES in message.metadata and self._announce(message, size):
            return
        if (self._announced or self._known) and self._fill(message, size):
            return
        while self._whole and (self._whole >= MAX_WHOLE or self._whole_bytes + size > self._limit):
            await self._wait()
        self._append(message, size)

    def _append(self, message: PackedMessage, size: int) -> None:
        if self._plain and (step_id := _step_id(message)):
            self._known.append(step_id)
        self._whole += 1
        self._whole_bytes += size
        self._steps.append((message, size))
        self._changed.set()

    def offer(self, message: PackedMessage) -> None:
        """Take a step that a Petals server pushes, if there is room; its client sends it, too."""
        size = message.size
        if not self._whole and _step_id(message) not in self._known and self._may_hold(size):
            self._append(message, size)

    async def get(self) -> tuple[PackedMessage, int]:
        """The next step, whole, and how many bytes it has."""
        while not self._steps or not _is_whole(self._steps[0]):
            await self._wait()
        first = self._steps.popleft()
        self._changed.set()
        if not isinstance(first, _Announced):
            self._whole -= 1
            self._whole_bytes -= first[1]
            self.filled, self.claim = False, None
            return first
        self.filled, self.claim = first.filled, first.claim
        del self._announced[first.step_id]
        self._known.append(first.step_id)
        self._held -= first.bytes
        if first.tensor is not None:
            first.message.tensors[0] = first.tensor
        return first.message, first.bytes

    def close(self) -> None:
        """Expect nothing more from other servers."""
        for session_id, announced in self._announced.values():
            self._pushes.forget(session_id, announced.step_id, announced.arrived)
        self._announced.clear()
        if self.session_id:
            self._pushes.dismiss(self.session_id, self.offer)

    def _introduce(self, message: PackedMessage) -> None:
        """Take a session's name from its first step; Petals' clients leave out the position."""
        metadata = protocol.unpack_metadata(message.metadata)
        self.session_id = fields.text(metadata, "session_id") or ""
        if self.session_id and "start_from_position" not in metadata:
            self._plain = True
            self._pushes.admit(self.session_id, self.offer)

    def _announce(self, message: PackedMessage, size: int) -> bool:
        metadata = protocol.unpack_metadata(message.metadata)
        peer = fields.text(metadata, protocol.PUSH_FROM)
        if not peer:
            return False
        session_id, step_id = fields.text(metadata, "session_id"), fields.text(metadata, "step_id")
        if not session_id or not step_id or not message.tensors:
            raise BadRequest(f"{protocol.PUSH_FROM}: such a step needs a session_id and a step_id")
        if step_id in self._announced or len(self._announced) >= MAX_ANNOUNCED:
            raise BadRequest(
                f"{protocol.PUSH_FROM}: {len(self._announced)} steps are announced already, at "
                f"most {MAX_ANNOUNCED} with different step ids are taken"
            )
        announced = _Announced(message, size, step_id)

        def arrived(tensor: PackedTensor, size: int, claim: Claim) -> None:
            # What does not fit is left out: the client sends it when the step is next.
            fits = announced.tensor is None and self._held + size <= self._limit
            if fits and self._may_hold(size):
                announced.claim = claim
                self._hold(announced, tensor, size)

        announced.arrived = arrived
        self._held += announced.bytes
        self._pushes.expect(peer, session_id, step_id, arrived)
        self._announced[step_id] = session_id, announced
        self._steps.append(announced)
        self._changed.set()
        return True

    def _fill(self, message: PackedMessage, size: int) -> bool:
        """Whether the message is for a step that has been announced, or is here already."""
        step_id = _step_id(message)
        found = self._announced.get(step_id)
        if found is None:
            return step_id in self._known  # the push was faster
        session_id, announced = found
        given_up = bool(message.tensors) and 0 in message.tensors[0].size
        if given_up and announced.tensor is not None:
            self._held -= announced.tensor_size
            announced.tensor, announced.tensor_size, announced.claim = None, 0, None
        if announced.tensor is None and message.tensors:
            self._pushes.forget(session_id, announced.step_id, announced.arrived)
            if self._held + size > self._limit:
                raise BadRequest(f"more than {self._limit} bytes wait for announced steps")
            announced.filled = True
            if given_up:
                self._held += size - announced.size
                announced.message, announced.size = message, size  # its mask has no positions
            self._hold(announced, message.tensors[0], size)
        return True

    def _hold(self, announced: _Announced, tensor: PackedTensor, size: int) -> None:
        announced.tensor, announced.tensor_size = tensor, size
        self._held += size
        self._changed.set()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _is_whole(step: tuple[PackedMessage, int] | _Announced) -> bool:
    return not isinstance(step, _Announced) or step.tensor is not None


def _step_id(message: PackedMessage) -> str:
    return fields.text(protocol.unpack_metadata(message.metadata), "step_id") or ""
