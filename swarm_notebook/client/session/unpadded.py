"""A session of a padded batch where Petals' servers may have a part: one session for each padding.

Petals' servers know no attention mask, and count the tokens of a batch together. So rows that have
as much padding before their tokens are a session of their own, without it, and what comes back is
put at its place (`passes.padding`). The sessions run side by side: a token takes as many requests
to each server as there are lengths in the batch. Rows are selected (beams) within the sessions.

A batch without padding, or in a swarm of our servers alone, is one session as ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass

import torch

from swarm_notebook.client.adapters import Adapter
from swarm_notebook.client.passes.padding import groups_of_rows
from swarm_notebook.client.request import Outputs
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.session.history import Pass
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.session.session import InferenceSession
from swarm_notebook.errors import Unsupported


@dataclass
class _Part:
    """Rows whose first token is at position ``first``, and their session.

    Attributes:
        shifts: of each row, how far its position ids are ahead of the places of its tokens.
    """

    rows: list[int]
    first: int
    shifts: torch.Tensor
    session: InferenceSession

    def before(self, position: int) -> int:
        """How many of the tokens of a pass from ``position`` on are padding."""
        return max(self.first - position, 0)

    def of(self, tensor: torch.Tensor, position: int) -> torch.Tensor:
        """Their tokens in ``[batch, length, …]``, a pass from ``position`` on."""
        return tensor[self.rows, self.before(position) :]


class UnpaddedSession(InferenceSession):
    """`InferenceSession`, for batches with padding before their tokens on any servers."""

    def __init__(self, directory: Directory, max_length: int | None = None):
        super().__init__(directory, max_length)
        self._max_length = max_length
        self._parts: list[_Part] = []
        self._pass = Pass(0, 0)

    @property
    def hops(self) -> list[Hop]:
        return [*super().hops, *(hop for part in self._parts for hop in part.session.hops)]

    @property
    def failovers(self) -> int:
        return super().failovers + sum(part.session.failovers for part in self._parts)

    @property
    def passed(self) -> int:
        if not self._parts:
            return super().passed
        rows = sum(len(part.rows) for part in self._parts)
        return sum(part.session.passed * len(part.rows) for part in self._parts) // rows

    @property
    def length(self) -> int:
        return self._pass.length if self._parts else super().length

    def select(self, rows: torch.Tensor) -> None:
        if not self._parts:
            super().select(rows)
        for part in self._parts:
            at = {row: place for place, row in enumerate(part.rows)}
            chosen = [place for place, row in enumerate(rows.tolist()) if row in at]
            own = torch.tensor([at[int(rows[place])] for place in chosen], dtype=torch.int64)
            part.session.select(own)
            part.rows, part.shifts = chosen, part.shifts[own]
        self._leave([part for part in self._parts if not part.rows])

    def begin(
        self,
        new: Pass,
        adapter: Adapter | None,
        prompts: torch.Tensor | None,
        absent: frozenset[int] = frozenset(),
    ) -> None:
        if new.position == 0:
            self._divide(new)
        if not self._parts:
            super().begin(new, adapter, prompts, absent)
            return
        if new.position:
            self._refuse_gaps(new)
        self._pass = new
        for part in self._parts:
            edits = {block: part.of(states, new.position) for block, states in new.edits.items()}
            position = max(new.position - part.first, 0)
            end = new.end - part.first
            own = Pass(position, end - position, edits, rotary_length=new.rotary_length)
            rest = None if prompts is None else prompts[:, :, part.first :]
            part.session.begin(
                own,
                None if adapter is None else adapter.for_rows(part.rows),
                rest if rest is not None and rest.shape[2] else None,
                absent,
            )

    def _refuse_gaps(self, new: Pass) -> None:
        """Refuse padding or a jump of positions behind the tokens before."""
        ids = new.position_ids
        if ids is None:
            ids = torch.arange(new.position, new.end)[None]
        ids = ids.expand(sum(len(part.rows) for part in self._parts), -1)
        places = torch.arange(new.position, new.end)
        jumps = any(
            not torch.equal(ids[part.rows], part.shifts[:, None] + places) for part in self._parts
        )
        if jumps or (new.mask is not None and not bool(new.mask.all())):
            raise Unsupported(
                "padding, or a jump of position_ids, between the tokens of a cache, which Petals' "
                "servers do not know; pass use_cache=False, or use servers started with "
                "`swarm-notebook serve`"
            )

    def edit(self, block: int, hidden: torch.Tensor) -> None:
        if not self._parts:
            super().edit(block, hidden)
        for part in self._parts:
            part.session.edit(block, part.of(hidden, self._pass.position))

    def copy_from(self, other: InferenceSession) -> None:
        super().copy_from(other)
        if isinstance(other, UnpaddedSession):
            self._pass = other._pass
            for part in other._parts:
                self._part(part.rows, part.first, part.shifts).copy_from(part.session)

    async def step(
        self,
        block: int,
        stop: int,
        states: Collection[int] = (),
        inner: Collection[tuple[int, str]] = (),
        *,
        last: int | None = None,
    ) -> Outputs:
        if not self._parts:
            return await super().step(block, stop, states, inner, last=last)
        for part in self._parts:
            part.session.timeline = self.timeline
        steps = [part.session.step(block, stop, states, inner) for part in self._parts]
        found = await asyncio.gather(*steps, return_exceptions=True)
        for outputs in found:
            if isinstance(outputs, BaseException):
                raise outputs
        return Outputs(self._put_back([one for one in found if isinstance(one, Outputs)]), {})

    def close(self) -> None:
        super().close()
        for part in self._parts:
            part.session.close()

    def _divide(self, new: Pass) -> None:
        """Make sessions for the rows of a first pass; none if one is enough."""
        self._leave(self._parts)
        if new.mask is None and new.position_ids is None:
            return
        if all(span.extended for span in self._directory.snapshot.spans):
            return
        like = next(iter(new.edits.values()))
        groups = groups_of_rows(like.shape[:2], new.mask, new.position_ids, "one of the servers")
        apart = [group for group in groups if group.last == new.length]
        if sum(len(group.rows) for group in apart) == like.shape[0]:
            for group in apart:
                shifts = torch.zeros(len(group.rows), dtype=torch.int64)
                if new.position_ids is not None:
                    ids = new.position_ids.expand(like.shape[0], -1)
                    shifts = ids[group.rows, group.first] - group.first
                self._part(group.rows, group.first, shifts)

    def _part(self, rows: list[int], first: int, shifts: torch.Tensor) -> InferenceSession:
        session = InferenceSession(self._directory, self._max_length)
        self._parts.append(_Part(list(rows), first, shifts, session))
        return session

    def _leave(self, parts: list[_Part]) -> None:
        for part in parts:
            part.session.close()
        self._parts = [part for part in self._parts if part not in parts]

    def _put_back(self, found: list[Outputs]) -> dict[int, torch.Tensor]:
        """The states of the whole batch, with zeros at padding."""
        rows, whole = sum(len(part.rows) for part in self._parts), {}
        for block, some in found[0].states.items():
            whole[block] = some.new_zeros(rows, self._pass.length, some.shape[-1])
            for part, outputs in zip(self._parts, found, strict=True):
                start = part.before(self._pass.position)
                whole[block][part.rows, start:] = outputs.states[block]
        return whole
