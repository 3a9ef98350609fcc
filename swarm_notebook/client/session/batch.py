"""The session of a batch: one for all rows, or one for each padding.

Petals' servers know no attention mask, and count the tokens of a batch together. So where they may
have a part, rows that have as much padding before their tokens are a session of their own, without
it, and what comes back is put at its place (`passes.padding`). The sessions run side by side: a
token takes as many requests to each server as there are lengths in the batch. Rows are selected
(beams) within the sessions.

A batch without padding, or in a swarm of our servers alone, is one session.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from swarm_notebook.client.passes.padding import groups_of_rows
from swarm_notebook.client.request import Outputs
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.session.history import Pass
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.session.session import Given, InferenceSession
from swarm_notebook.client.telemetry import StepRecord, Timeline
from swarm_notebook.errors import Unsupported


class BatchSession:
    """KV caches for one batch of sequences, padded or not, on any servers.

    Args: as for `InferenceSession`.
    """

    def __init__(self, directory: Directory, max_length: int | None = None):
        self._new = functools.partial(InferenceSession, directory, max_length)
        self._directory = directory
        self._parts: Sequence[_Part] = [_Part(self._new())]
        self._pass = Pass(0, 0)
        # They belong to the network's thread, in which the next step closes them.
        self._left: list[InferenceSession] = []

    @property
    def _sessions(self) -> list[InferenceSession]:
        return [part.session for part in self._parts]

    @property
    def hops(self) -> list[Hop]:
        """The servers in use, in the order of their blocks, for one padding after another."""
        return [hop for session in self._sessions for hop in session.hops]

    @property
    def failovers(self) -> int:
        return sum(session.failovers for session in self._sessions)

    @property
    def peers(self) -> frozenset[str]:
        """Servers that have had a part in what came so far; empty where nothing is audited."""
        return frozenset().union(*(session.history.peers for session in self._sessions))

    @property
    def passed(self) -> int:
        """Tokens of the present step times blocks that they have passed, on average."""
        rows = sum(part.count for part in self._parts)
        return sum(part.session.passed * part.count for part in self._parts) // rows

    @property
    def length(self) -> int:
        """Tokens of the present pass."""
        return self._pass.length

    @property
    def latest(self) -> StepRecord | None:
        """The step that last came back, if any."""
        return self._parts[0].session.latest

    def select(self, rows: torch.Tensor) -> None:
        """From the next step on, continue these rows (beam search, batch changes)."""
        for part in self._parts:
            part.select(rows)
        self._left += [part.session for part in self._parts if not part.count]
        self._parts = [part for part in self._parts if part.count]

    def begin_generation(self) -> Timeline:
        """As `InferenceSession.begin_generation`."""
        first, *others = self._sessions
        timeline = first.begin_generation()
        for session in others:
            session.timeline = timeline
        return timeline

    def begin(self, new: Pass, given: Given) -> None:
        """As `InferenceSession.begin`; a first pass decides how the batch is divided.

        Raises:
            Unsupported: padding that Petals' servers cannot have.
        """
        if new.position == 0:
            self._divide(new)
        for part in self._parts:
            part.refuse_gaps(new)
        self._pass = new
        for part in self._parts:
            part.session.begin(part.of_pass(new), part.of_given(given))

    def edit(self, block: int, hidden: torch.Tensor) -> None:
        """In the current pass, ``block`` gets this input instead of the one before's output."""
        for part in self._parts:
            part.session.history.edit(block, part.of(hidden, self._pass.position))

    @property
    def edited(self) -> frozenset[int]:
        """Blocks whose input a hook decided in the latest pass: it will again, most likely."""
        return self._parts[0].session.history.edited_last

    def copy_from(self, other: BatchSession) -> None:
        """As `InferenceSession.copy_from`."""
        self._pass = other._pass
        self._parts = [part.copy(self._new()) for part in other._parts]

    async def step(
        self,
        block: int,
        stop: int,
        states: Collection[int] = (),
        inner: Collection[tuple[int, str]] = (),
        *,
        last: int | None = None,
    ) -> Outputs:
        """As `InferenceSession.step`."""
        self._close_left()
        if not self._rows:
            return await self._sessions[0].step(block, stop, states, inner, last=last)
        if self._sessions[0].timeline is None:
            self.begin_generation()
        steps = [session.step(block, stop, states, inner) for session in self._sessions]
        found = await asyncio.gather(*steps, return_exceptions=True)
        for outputs in found:
            if isinstance(outputs, BaseException):
                raise outputs
        return Outputs(self._put_back([one for one in found if isinstance(one, Outputs)]), {})

    def close(self) -> None:
        """As `InferenceSession.close`."""
        self._close_left()
        for session in self._sessions:
            session.close()

    def _close_left(self) -> None:
        while self._left:
            self._left.pop().close()

    @property
    def _rows(self) -> list[_Rows]:
        """The parts of a batch that is divided."""
        return [part for part in self._parts if isinstance(part, _Rows)]

    def _divide(self, new: Pass) -> None:
        """Make sessions for the rows of a first pass, or one for all if it is enough."""
        parts = self._apart(new)
        if not parts and not self._rows:
            return
        before = self._sessions
        self._left += before
        self._parts = parts or [_Part(self._new())]
        for session in self._sessions:
            session.timeline = before[0].timeline

    def _apart(self, new: Pass) -> list[_Rows]:
        """The rows with each padding, if there is any and Petals' servers may have a part."""
        if new.mask is None and new.position_ids is None:
            return []
        if all(span.extended for span in self._directory.snapshot.spans):
            return []
        like = next(iter(new.edits.values()))
        groups = groups_of_rows(like.shape[:2], new.mask, new.position_ids, "one of the servers")
        apart = [group for group in groups if group.last == new.length]
        if sum(len(group.rows) for group in apart) < like.shape[0]:
            return []
        found = []
        for group in apart:
            shifts = torch.zeros(len(group.rows), dtype=torch.int64)
            if new.position_ids is not None:
                ids = new.position_ids.expand(like.shape[0], -1)
                shifts = ids[group.rows, group.first] - group.first
            found.append(_Rows(self._new(), list(group.rows), group.first, shifts))
        return found

    def _put_back(self, found: Sequence[Outputs]) -> dict[int, torch.Tensor]:
        """The states of the whole batch, with zeros at padding."""
        rows, whole = sum(part.count for part in self._parts), {}
        for block, some in found[0].states.items():
            whole[block] = some.new_zeros(rows, self._pass.length, some.shape[-1])
            for part, outputs in zip(self._rows, found, strict=True):
                part.put(whole[block], outputs.states[block], self._pass.position)
        return whole


@dataclass
class _Part:
    """All rows of a batch, and their session."""

    session: InferenceSession

    @property
    def count(self) -> int:
        """How many rows; without them, all count as one."""
        return 1

    def of(self, tensor: torch.Tensor, _position: int) -> torch.Tensor:
        """Their tokens in ``[batch, length, …]``, a pass from ``_position`` on."""
        return tensor

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows of the batch."""
        self.session.history.select(rows)

    def refuse_gaps(self, new: Pass) -> None:
        """Refuse padding or a jump of positions behind the tokens before, if it cannot travel."""

    def of_pass(self, new: Pass) -> Pass:
        """Their part of a pass of the batch."""
        return new

    def of_given(self, given: Given) -> Given:
        """Their part of what it runs with."""
        return given

    def copy(self, session: InferenceSession) -> _Part:
        """The same rows in a session that begins where theirs is."""
        session.copy_from(self.session)
        return replace(self, session=session)


@dataclass
class _Rows(_Part):
    """Rows whose first token is at position ``first``, and their session.

    Attributes:
        shifts: of each row, how far its position ids are ahead of the places of its tokens.
    """

    rows: list[int]
    first: int
    shifts: torch.Tensor

    @property
    def count(self) -> int:
        return len(self.rows)

    def _before(self, position: int) -> int:
        """How many of the tokens of a pass from ``position`` on are padding."""
        return max(self.first - position, 0)

    def of(self, tensor: torch.Tensor, position: int) -> torch.Tensor:
        return tensor[self.rows, self._before(position) :]

    def put(self, whole: torch.Tensor, own: torch.Tensor, position: int) -> None:
        """Write what came back of a pass from ``position`` on to its place in the batch."""
        whole[self.rows, self._before(position) :] = own

    def select(self, rows: torch.Tensor) -> None:
        at = {row: place for place, row in enumerate(self.rows)}
        chosen = [place for place, row in enumerate(rows.tolist()) if row in at]
        own = torch.tensor([at[int(rows[place])] for place in chosen], dtype=torch.int64)
        self.session.history.select(own)
        self.rows, self.shifts = chosen, self.shifts[own]

    def refuse_gaps(self, new: Pass) -> None:
        if new.position == 0:
            return
        places, ids = torch.arange(new.position, new.end), new.position_ids
        own = places[None] if ids is None else ids if ids.shape[0] == 1 else ids[self.rows]
        jumps = not bool((own == self.shifts[:, None] + places).all())
        if jumps or (new.mask is not None and not bool(new.mask.all())):
            raise Unsupported(
                "padding, or a jump of position_ids, between the tokens of a cache, which Petals' "
                "servers do not know; pass use_cache=False, or use servers started with "
                "`swarm-notebook serve`"
            )

    def of_pass(self, new: Pass) -> Pass:
        edits = {block: self.of(states, new.position) for block, states in new.edits.items()}
        position, end = max(new.position - self.first, 0), new.end - self.first
        return Pass(position, end - position, edits, rotary_length=new.rotary_length)

    def of_given(self, given: Given) -> Given:
        adapter = None if given.adapter is None else given.adapter.for_rows(self.rows)
        prompts = None if given.prompts is None else given.prompts[:, :, self.first :]
        if prompts is not None and not prompts.shape[2]:
            prompts = None
        return Given(adapter, prompts, given.absent)
