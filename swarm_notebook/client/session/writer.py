"""Steps of one session as messages to one server.

A session on a server is introduced by its first step, and a step need not name its blocks when
they are those of the step before: so steps are written in the order in which they are worked on.
A step that is sent again (its hidden states were to be pushed, and were not) takes its old place,
and therefore says all by itself.
"""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass

from swarm_notebook.client.passes.call import server_name
from swarm_notebook.client.request import Request, refuse_extensions, travelling
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.net.wire import prints, protocol
from swarm_notebook.net.wire.message import PackedMessage

# How long a Petals server may let a new session wait for room in its cache, in seconds.
ALLOC_TIMEOUT = 10.0

_RUN, _STEPS = uuid.uuid4().hex[:8], itertools.count()


def new_step_id() -> str:
    """A name for a step that no other step of this notebook has; cheaper than a uuid."""
    return f"{_RUN}-{next(_STEPS)}"


@dataclass(slots=True)
class StepRoute:
    """How a step's hidden states travel.

    Attributes:
        step_id: the same for all servers of a chain.
        push_from: the peer that hands over the input; None: the client sends it.
        push_to: the peer and its session that get the output besides the client.
    """

    step_id: str
    push_from: str | None = None
    push_to: tuple[str, str] | None = None


class StepWriter:
    """Writes the steps of one session on the server of a segment.

    Attributes:
        session_id: the session's name on the server.
        print_seed: by which it says what was pushed to it; None if it does not.
        copy_of: a session there and its last step, with whose cache this one begins.
    """

    def __init__(self, segment: RouteSegment, directory: Directory, max_length: int):
        self._segment, self._directory, self._max_length = segment, directory, max_length
        self.session_id: str = str(uuid.uuid4())
        self.print_seed: bytes | None = prints.new_seed() if segment.span.pushes else None
        self.copy_of: tuple[str, str] | None = None
        self._introduced = False
        self._named: tuple[int, int] | None = None

    def write(self, request: Request, route: StepRoute, *, again: bool = False) -> PackedMessage:
        """The message for a step.

        Raises:
            Unsupported: the server is one of Petals', which knows no such request.
        """
        span = self._segment.span
        refuse_extensions(span, server_name(self._segment), request)
        metadata: dict = {
            "session_id": self.session_id,
            "step_id": route.step_id,
            "start_from_position": request.position,
        }
        if not self._introduced:
            metadata["max_length"] = self._max_length
            metadata["alloc_timeout"] = ALLOC_TIMEOUT
            if self.copy_of is not None:
                metadata[protocol.COPY_OF] = self.copy_of
            self._introduced = True
        if route.push_from is not None:
            metadata[protocol.PUSH_FROM] = route.push_from
            if self.print_seed is not None:
                metadata[protocol.PRINT] = self.print_seed
        if route.push_to is not None:
            metadata[protocol.PUSH_TO] = route.push_to
        metadata.update(request.options())
        compression = self._directory.compression_for(span)
        if compression:
            metadata["output_compression"] = (compression,)
        hidden = None if route.push_from else travelling(request.hidden, span)
        slots = [hidden, request.prompts, request.rows, request.mask, request.position_ids]
        return PackedMessage(
            uid=self._uid(request, again),
            # Only Petals insists on the slots that are not used; building them takes time.
            tensors=protocol.pack_slots(
                slots, always=1 if span.extended else 3, compression=compression
            ),
            metadata=protocol.pack_metadata(metadata),
        )

    def ask_for_proof(self, request: Request, of: tuple[str, str]) -> PackedMessage:
        """The message by which a server is asked what was pushed to it.

        Args:
            request: of the step.
            of: another session of this notebook there, and the step.
        """
        metadata = protocol.pack_metadata({protocol.PROVE: of})
        uid = protocol.uid_chain(self._directory.prefix, request.start, request.end)
        return PackedMessage(uid=uid, metadata=metadata)

    def _uid(self, request: Request, again: bool) -> str:
        blocks = (request.start, request.end)
        known = self._segment.span.extended and self._named == blocks
        if known and not again:
            return ""
        if not again:
            self._named = blocks
        return protocol.uid_chain(self._directory.prefix, *blocks)
