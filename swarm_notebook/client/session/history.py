"""What a session's blocks got as input, kept so that any server's cache can be rebuilt. Pure code.

The servers' caches are a function of the inputs: for each pass over the model the notebook keeps
the input of the first block, of every block where a server's part begins, and of every block
whose input was changed between two blocks by a hook (an *edit*). A lost cache is rebuilt by
replaying them. Appending costs nothing: passes stay separate tensors, row selections (beam search)
are noted and applied only when something is replayed, a rollback cuts off the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

import torch

from swarm_notebook.client.adapters import Adapter
from swarm_notebook.client.request import Request
from swarm_notebook.client.servers.routing import RouteSegment


@dataclass(frozen=True)
class Computed:
    """Who has computed a pass up to some block, from the input of block ``start`` on.

    Attributes:
        adapter: id and version of what it was run with.
        answered: from which position on the server's answer is known; zeros stand before it.
        asked: in which share of such passes more answers were asked for than are needed, if they
            were here; else 1.
    """

    segment: RouteSegment
    start: int
    adapter: tuple[str, int] | None
    answered: int = 0
    asked: float = 1.0

    def same_work(self, other: Computed) -> bool:
        """Whether it is one server's work on the same blocks with the same adapter."""
        mine = (self.segment.peer, self.start, self.adapter)
        return mine == (other.segment.peer, other.start, other.adapter)


@dataclass
class Pass:
    """One pass of ``length`` tokens from ``position`` on.

    Attributes:
        inputs: input of a block, ``[batch, length, hidden]``, by block; derived from the chain.
        edits: the same where a hook (or the embedding) decided it; these cannot be recomputed.
        mask: attention mask of these tokens, ``[batch, length]`` uint8, or None for ones.
        position_ids: ``[batch or 1, length]`` int64, or None for the model's own count.
        rotary_length: as in `Request`.
        computed: who has computed the input of a block, by block, where it is an input of `inputs`
            that a server has sent for this very pass.
        peers: servers that have had a part in it or in a pass before, and from which block on:
            what is known where answers are audited.
    """

    position: int
    length: int
    edits: dict[int, torch.Tensor] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    rotary_length: int | None = None
    computed: dict[int, Computed] = field(default_factory=dict)
    peers: dict[str, int] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.position + self.length

    @property
    def rows(self) -> int:
        return next(iter(self.edits.values())).shape[0]

    def input_of(self, block: int) -> torch.Tensor | None:
        """The known input of `block`, if any."""
        known = self.edits.get(block)
        return known if known is not None else self.inputs.get(block)

    def cuts(self, start: int, end: int) -> list[int]:
        """``[start, …edits between…, end]``: the stages that must be run one by one."""
        return [start, *sorted(block for block in self.edits if start < block < end), end]

    def joins(self, later: Pass, start: int, end: int) -> bool:
        """Whether blocks ``[start, end)`` may run this pass and the one behind it as one."""
        cuts, length = self.cuts(start, end), self.rotary_length
        return cuts == later.cuts(start, end) and length == later.rotary_length

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Pass:
        """The same pass with ``change`` applied to every tensor that has the batch's rows."""
        ids = self.position_ids
        return replace(
            self,
            edits={block: change(tensor) for block, tensor in self.edits.items()},
            inputs={block: change(tensor) for block, tensor in self.inputs.items()},
            mask=None if self.mask is None else change(self.mask),
            position_ids=ids if ids is None or ids.shape[0] == 1 else change(ids),
        )

    def tokens(self, first: int, last: int) -> Pass:
        """The part of this pass between two absolute token positions."""
        low, high = first - self.position, last - self.position
        ids = self.position_ids
        part = replace(
            self,
            edits={block: tensor[:, low:high] for block, tensor in self.edits.items()},
            inputs={block: tensor[:, low:high] for block, tensor in self.inputs.items()},
            mask=None if self.mask is None else self.mask[:, low:high],
            position_ids=None if ids is None else ids[:, low:high],
        )
        part.position, part.length = first, last - first
        return part


class History:
    """The passes of one session in order, with the row selections between them.

    Attributes:
        adapter, prompts: what the blocks run with in the current pass besides their own weights;
            deep prompts are ``[blocks, batch or 1, length, hidden]``.
        rows: the latest selection of rows, for servers that have not followed it yet.
        rows_version: how many selections there were.
    """

    def __init__(self) -> None:
        self._events: list[Pass | torch.Tensor] = []
        self._edited: set[int] = set()
        self.adapter: Adapter | None = None
        self.prompts: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.rows_version: int = 0

    def __bool__(self) -> bool:
        return any(isinstance(event, Pass) for event in self._events)

    def copy(self) -> History:
        """The same passes, to be continued in another way; tensors are shared."""
        twin = History()
        twin._events = [
            replace(
                event,
                edits=dict(event.edits),
                inputs=dict(event.inputs),
                computed=dict(event.computed),
                peers=dict(event.peers),
            )
            if isinstance(event, Pass)
            else event
            for event in self._events
        ]
        twin._edited = set(self._edited)
        twin.adapter, twin.prompts = self.adapter, self.prompts
        twin.rows, twin.rows_version = self.rows, self.rows_version
        return twin

    @property
    def current(self) -> Pass:
        """The latest pass."""
        last = self._events[-1]
        if not isinstance(last, Pass):
            raise LookupError("no pass has begun since the rows were selected")
        return last

    def begin(self, new: Pass) -> None:
        """Start a pass; everything recorded from its position on is forgotten."""
        self.truncate(new.position)
        new.peers |= self.peers
        self._events.append(new)
        self._edited.update(new.edits)

    @property
    def peers(self) -> dict[str, int]:
        """`Pass.peers` of the latest pass; a copy."""
        passes = (event for event in reversed(self._events) if isinstance(event, Pass))
        return next((dict(event.peers) for event in passes), {})

    def edit(self, block: int, hidden: torch.Tensor) -> None:
        """In the current pass, ``block`` gets this input instead of the one before's output."""
        self.current.edits[block] = hidden
        self._edited.add(block)

    @property
    def edited_last(self) -> frozenset[int]:
        """Blocks whose input was decided by a hook in the latest pass."""
        passes = (event for event in reversed(self._events) if isinstance(event, Pass))
        return next((frozenset(latest.edits) for latest in passes), frozenset())

    @property
    def edited(self) -> Collection[int]:
        """Blocks whose input was decided by a hook in any pass so far."""
        return self._edited

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on. Row selections stay: they hold for what remains."""
        # Passes lie in the order of their positions, so only the last events can be concerned.
        keep = len(self._events)
        while keep:
            event = self._events[keep - 1]
            if isinstance(event, Pass) and event.end <= length:
                break
            keep -= 1
        tail = self._events[keep:]
        del self._events[keep:]
        for event in tail:
            if isinstance(event, Pass):
                if event.position >= length:
                    continue
                event = event.tokens(event.position, length)
            self._events.append(event)

    def select(self, rows: torch.Tensor) -> None:
        """From now on, continue these rows of everything recorded so far (repeat, reorder)."""
        if self:
            self._events.append(rows)
            self.rows_version += 1
            self.rows = rows

    def settle(self) -> None:
        """Apply the noted row selections to the tensors, so that all have the present rows."""
        if not any(isinstance(event, torch.Tensor) for event in self._events):
            return
        settled: list[Pass] = []
        rows: torch.Tensor | None = None
        for event in reversed(self._events):
            if isinstance(event, torch.Tensor):
                rows = event if rows is None else event[rows]
            elif rows is None:
                settled.append(event)
            else:
                settled.append(event.map(rows_of(rows)))
        self._events = list(reversed(settled))

    def replay(self, start: int, end: int, length: int) -> Iterator[Pass]:
        """Passes to run through blocks ``[start, end)`` to rebuild the first ``length`` tokens.

        Neighbouring passes that can run as one come merged. What is derived
        from such a merged pass is given back with `learn`.
        """
        self.settle()
        run: list[Pass] = []
        for event in self._events:
            if not isinstance(event, Pass) or event.position >= length:
                continue
            part = event.tokens(event.position, min(event.end, length))
            if run and not run[-1].joins(part, start, end):
                yield _merge(run, start)
                run = []
            run.append(part)
        if run:
            yield _merge(run, start)

    def learn(self, block: int, position: int, tensor: torch.Tensor) -> None:
        """Note the derived input of ``block`` for the tokens of ``tensor`` from ``position`` on."""
        end = position + tensor.shape[1]
        for event in self._events:
            if isinstance(event, Pass) and position <= event.position and event.end <= end:
                low = event.position - position
                event.inputs[block] = tensor[:, low : low + event.length]
                event.computed.pop(block, None)

    def passes(self) -> list[Pass]:
        """All passes in order; their rows are the present ones after `settle`."""
        return [event for event in self._events if isinstance(event, Pass)]

    def distrust(self, peers: Collection[str]) -> tuple[int, int] | None:
        """Forget whatever was derived from what these peers have computed.

        Returns:
            the first block and the first position that they computed; None if they did nothing.
        """
        touched = [
            (start, part.position)
            for part in self.passes()
            for peer, start in part.peers.items()
            if peer in peers
        ]
        if not touched:
            return None
        first = min(start for start, _ in touched)
        for part in self.passes():
            for known in (part.inputs, part.computed):
                for block in [block for block in known if block > first]:
                    del known[block]
            part.peers = {peer: at for peer, at in part.peers.items() if peer not in peers}
        return first, min(position for _, position in touched)

    def request(
        self,
        start: int,
        end: int,
        part: Pass,
        states: Collection[int] = (),
        inner: Collection[tuple[int, str]] = (),
        *,
        later: bool = False,
        last: int | None = None,
    ) -> Request:
        """What the server of blocks ``[start, end)`` is asked for some tokens of a pass.

        Args:
            later: the hidden states come later, from the blocks before; now only their shape is
                right.
            last: as in `Request`.
        """
        hidden = part.input_of(start)
        if hidden is None:
            if not later:
                raise LookupError(f"the history has no input of block {start}")
            hidden = next(iter(part.edits.values()))
        return Request(
            start,
            end,
            hidden,
            part.position,
            mask=part.mask,
            position_ids=part.position_ids,
            states=[index for index in states if start <= index < end - 1],
            inner=[named for named in inner if start <= named[0] < end],
            prompts=self._prompts(start, end, part),
            adapter=self.adapter,
            rows_version=self.rows_version,
            rotary_length=part.rotary_length,
            last=last,
        )

    def _prompts(self, start: int, end: int, part: Pass) -> torch.Tensor | None:
        """Deep prompts of these blocks, if the pass reaches into their positions."""
        prompts = self.prompts
        if prompts is None or part.position >= prompts.shape[2]:
            return None
        return prompts[start:end]


def rows_of(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that selects ``rows`` of a tensor."""
    return lambda tensor: tensor.index_select(0, rows)


def _merge(run: list[Pass], start: int) -> Pass:
    """Neighbouring passes as one; only the input of `start` is kept of the derived ones."""
    if len(run) == 1:
        return run[0]
    first = run[0]
    length = sum(part.length for part in run)
    known = [part.input_of(start) for part in run]
    batch = first.rows
    shared = set(first.edits).intersection(*(part.edits for part in run))
    return Pass(
        first.position,
        length,
        edits={block: torch.cat([part.edits[block] for part in run], dim=1) for block in shared},
        inputs={}
        if any(tensor is None for tensor in known)
        else {start: torch.cat([tensor for tensor in known if tensor is not None], dim=1)},
        mask=_merge_masks(run, batch),
        position_ids=_merge_position_ids(run, batch),
        rotary_length=first.rotary_length,
    )


def _merge_masks(run: list[Pass], batch: int) -> torch.Tensor | None:
    if all(part.mask is None for part in run):
        return None
    masks = [
        torch.ones(batch, part.length, dtype=torch.uint8) if part.mask is None else part.mask
        for part in run
    ]
    return torch.cat(masks, dim=1)


def _merge_position_ids(run: list[Pass], batch: int) -> torch.Tensor | None:
    if all(part.position_ids is None for part in run):
        return None
    ids = [
        torch.arange(part.position, part.end)[None]
        if part.position_ids is None
        else part.position_ids
        for part in run
    ]
    return torch.cat([row.expand(batch, -1) for row in ids], dim=1)
