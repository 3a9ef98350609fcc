"""What the server remembers of one session, and how a step changes it. No I/O in here.

A step goes through three stages. `check` compares it with what the cache holds and gives its
position; `needs` says how much memory it takes; `run`, in the torch thread, rolls back, selects
rows, computes and appends; or `batch_part` prepares the step for a call that it shares with others
(see `batching`). A step that `check` refuses has changed nothing.

The attention mask of the past is kept here per position, because a request only brings that of
its new tokens. As long as nobody sends a 0, there is no mask at all and HF takes its fast path.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from swarm_notebook.errors import BadRequest, ServerBusy
from swarm_notebook.server.engine.attention.batch import Part
from swarm_notebook.server.engine.kv.cache import SessionCache, grown_capacity
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.memory.host import to_host


class SessionState:
    """The cache and the attention mask of one session.

    Args:
        span: the blocks that the server hosts.
        context: how many positions the model has.
        choose: which blocks to run a step with: ``span``, or the same with an adapter in them.
        cache: where its keys and values go; memory of its own if None.

    Attributes:
        span_for: ``choose``, or what gives ``span`` for all steps.
    """

    span: Span

    def __init__(
        self,
        span: Span,
        context: int | None,
        choose: Callable[[Step], Span] | None = None,
        cache: SessionCache | None = None,
    ):
        self.span_for: Callable[[Step], Span] = choose or (lambda _: span)
        self.cache: SessionCache = cache or SessionCache(span.start, span.end)
        self.span, self._context = span, context
        self._mask: torch.Tensor | None = None

    def check(self, step: Step) -> int:
        """The position at which the step's tokens begin.

        Raises:
            BadRequest: the step does not follow from what the cache holds.
        """
        lengths = self.cache.lengths(*step.blocks)
        shortest, position = min(lengths), step.position
        if position is None:
            position = shortest
            if max(lengths) != position:
                raise BadRequest(
                    f"start_from_position: missing, and the blocks hold {shortest} to "
                    f"{max(lengths)} positions"
                )
        if position > shortest:
            raise BadRequest(
                f"start_from_position: {position}, but the cache holds only {shortest} positions"
            )
        if self._context is not None and position + step.length > self._context:
            raise BadRequest(f"{position} + {step.length} positions, the model has {self._context}")
        self._check_rows(step)
        return position

    def needs(self, step: Step, position: int) -> tuple[int, int] | None:
        """Cache tokens for the step, preferred and needed; None if they are there."""
        return self.room(step.rows, max(position + step.length, self.cache.length))

    def room(self, rows: int, length: int) -> tuple[int, int] | None:
        """Cache tokens for so many rows and positions, preferred and needed; None if there."""
        cache = self.cache
        length += -length % cache.granule
        if rows == cache.rows and length <= cache.capacity:
            return None
        preferred = grown_capacity(cache.capacity, length, self._context)
        preferred += -preferred % cache.granule
        return rows * preferred, rows * length

    @torch.inference_mode()
    def copy_from(self, other: SessionState, length: int) -> None:
        """Hold what another session holds of the first ``length`` positions; room is there."""
        self.cache.copy_from(other.cache, length)
        self._mask = None if other._mask is None else other._mask.clone()

    def run(self, step: Step, position: int, begin: int, end: int) -> list[torch.Tensor]:
        """Compute the step's positions ``[begin, end)``; called in order, from 0 on."""
        if begin == 0:
            self.span_for(step)  # what is not there must not cost the session its cache
            self._prepare(step, position)
        return self.compute(step, position, begin, end)

    def batch_part(self, step: Step, position: int) -> Part:
        """The step as a part of a call for several sessions; prepared as by `run`."""
        span = self.span_for(step)
        self._prepare(step, position)
        mask = self._extend_mask(step, position, 0, step.length)
        return Part(
            self.cache,
            step.rows,
            step.length,
            mask,
            tuners=span.tuners,
            additions=span.additions,
        )

    def padded_by(self, step: Step) -> bool:
        """Whether there is padding in the session with this step."""
        new = step.attention_mask
        return self._mask is not None or (new is not None and not bool(new.all()))

    def compute(self, step: Step, position: int, begin: int, end: int) -> list[torch.Tensor]:
        """`run`, after the session has been prepared."""
        mask = self._extend_mask(step, position, begin, end)
        ids, prompts = step.position_ids, step.prompts
        if prompts is not None:
            # They belong to the first positions of the sequence, not of the step.
            prompts = prompts[:, :, position + begin : position + end]
        return self.span_for(step).run(
            *step.blocks,
            step.hidden[:, begin:end],
            cache=self.cache,
            attention_mask=mask,
            position_ids=None if ids is None else ids[:, begin:end],
            prompts=prompts,
            states=step.states,
            **{**step.extras(), "rotary_length": step.turning_length(position)},
        )

    def _check_rows(self, step: Step) -> None:
        rows, ids = self.cache.rows, step.row_ids
        if self.cache.empty:
            return
        if ids is None and step.rows != rows:
            raise BadRequest(
                f"hidden states: {step.rows} rows, the session has {rows}; hypo_ids names the "
                "rows to go on with"
            )
        if ids is not None and max(ids) >= rows:
            raise BadRequest(f"hypo_ids: row {max(ids)} does not exist, the session has {rows}")

    def _prepare(self, step: Step, position: int) -> None:
        """Roll back to the step's position and select its rows."""
        if self.cache.empty:
            self.cache.restart(step.rows)
            self._mask = None
            return
        self.cache.truncate(*step.blocks, position)
        if step.row_ids is not None:
            with torch.inference_mode():
                self.cache.select_rows(step.row_ids)
            if self._mask is not None:
                self._mask = self._mask[step.row_ids]

    # In inference mode whoever calls: what is made in it can be written to only there.
    @torch.inference_mode()
    def _extend_mask(self, step: Step, position: int, begin: int, end: int) -> torch.Tensor | None:
        """The mask of all positions up to the piece's end, or None if nothing is masked."""
        new = step.attention_mask
        if not self.padded_by(step):
            return None
        begin, end, piece = position + begin, position + end, slice(begin, end)
        if self._mask is None or end > self._mask.shape[1]:
            mask = torch.ones(step.rows, max(self.cache.capacity, end), dtype=torch.int64)
            mask = mask.to(self.span.device)
            if self._mask is not None:
                mask[:, : self._mask.shape[1]] = self._mask
            self._mask = mask
        self._mask[:, begin:end] = 1 if new is None else new[:, piece]
        return self._mask[:, :end]


@dataclass(frozen=True, slots=True, eq=False)
class BatchItem:
    """A session's step, or the positions ``[begin, end)`` of one that is long.

    Attributes:
        position: where the step begins in its session.
    """

    state: SessionState
    step: Step
    position: int
    begin: int
    end: int


def run_one(item: BatchItem) -> list[torch.Tensor]:
    """The outputs of an item by itself, on the CPU; without positions that nobody gets.

    Raises: as `run_where_it_is`.
    """
    began = time.perf_counter()
    # Here and not where it is packed: nobody else's answer waits for the card meanwhile.
    outputs = [to_host(output) for output in run_where_it_is(item)]
    item.step.times.compute += time.perf_counter() - began
    return outputs


def run_where_it_is(item: BatchItem) -> list[torch.Tensor]:
    """As `run_one`, on the device that computes it, which is done then.

    Raises:
        ServerBusy: the card has no memory left for it.
    """
    try:
        outputs = item.state.run(item.step, item.position, item.begin, item.end)
    except torch.OutOfMemoryError:
        raise no_memory(item.step) from None
    if item.state.span.device.type == "cuda":
        # Even if nothing of it is wanted: how long it takes decides how much is computed at once.
        torch.cuda.current_stream().synchronize()
    unwanted = item.step.unwanted - item.begin
    if unwanted > 0:
        outputs[0] = outputs[0][:, unwanted:]
    return outputs


def no_memory(step: Step) -> ServerBusy:
    """What a session gets when the card has no memory left for its step."""
    torch.cuda.empty_cache()
    return ServerBusy(
        f"the card has no memory left for a step of {step.rows} x {step.length} tokens; send less "
        "at once, try again later or use another server"
    )
