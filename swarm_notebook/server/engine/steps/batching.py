"""Steps of several sessions as one call: which can share it, how, and whether the model allows it.

`Batching.group` names the steps that can run as one: through the same blocks, whatever their
adapters. A step runs alone if something in it concerns the whole call: prompts that are added to
its positions, outputs of modules inside of blocks, dropout, rows with adapters of their own.

`Batching.run` computes a batch in one call, and one more for each adapter that cannot be mixed in
(`mixing`). A session whose step turns out to be wrong gets its error alone; if the call itself
fails, its sessions run one by one, so that only the one that makes it fail gets the error.

`Batching.try_out` tells whether a model's blocks can be shared at all (see `attention.batch`): two
sessions of different shapes, one of them padded, must get the same together as apart. BLOOM and
Falcon do not call transformers' attention interface; rotations that stretch with the longest
sequence of a call would stretch for everybody in it. Such models run session by session.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from swarm_notebook.errors import SwarmError
from swarm_notebook.server.adapters import mixing
from swarm_notebook.server.adapters.mixing import Site
from swarm_notebook.server.engine.attention.batch import Part
from swarm_notebook.server.engine.kv.cache import SessionCache
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.decode import Decoding, Impossible
from swarm_notebook.server.engine.steps.session_state import BatchItem, no_memory, run_one
from swarm_notebook.server.engine.steps.trial import is_close, trial_sessions

logger: logging.Logger = logging.getLogger(__name__)

# Beyond so many tokens (rows x positions) a step is compute of its own, which a batch cannot share.
SHORT_TOKENS = 64

# With `Batching.alone`: the rows of every captured step. On an H100 one row takes 7.8 ms in its own
# bucket, and 10.7 in one of 32 (`decode`), which so many sessions share.
FIXED_ROWS = 32
# And the tokens of a chunk of a prompt, whoever else is there.
FIXED_CHUNK = 256

Outcome = list[torch.Tensor] | Exception


@dataclass(frozen=True)
class Batching:
    """What the sessions of a span can share.

    Attributes:
        possible: whether they can share calls at all.
        token_wise: the modules around which layers of adapters can be mixed in.
        decoding: runs the steps that it takes; None if it cannot run any of these blocks.
        why: there is none.
        alone: no row's bits may depend on whose other steps are computed (``--reproducible``):
            calls have fixed shapes, or a session to themselves.
    """

    possible: bool = False
    token_wise: frozenset[Site] = frozenset()
    decoding: Decoding | None = None
    why: str = "CUDA graphs need an NVIDIA GPU"
    alone: bool = False

    def with_decoding(self, span: Span, hidden_size: int, tokens: int) -> Batching:
        """The same, with graphs for the steps of sessions if they can be had.

        Args:
            tokens: how many cache tokens the sessions may have.
        """
        try:
            rows = FIXED_ROWS if self.alone else None
            decoding = Decoding.try_out(span, hidden_size, tokens, capture=True, rows=rows)
        except (Impossible, torch.OutOfMemoryError) as error:
            torch.cuda.empty_cache()
            why = str(error)
            if isinstance(error, torch.OutOfMemoryError):
                why = f"the card has no room for {tokens} cache tokens in one piece"
            logger.info("steps run without graphs: %s", why)
            return replace(self, why=why)
        if not self.alone:  # bits would change when compiled blocks take over
            decoding.compile_beside()
        return replace(self, decoding=decoding, why="")

    @property
    def engine(self) -> str:
        """How the steps of sessions run, for people."""
        return f"plain: {self.why}" if self.decoding is None else self.decoding.engine

    def new_cache(self) -> SessionCache | None:
        """A new session's cache; None if it has memory of its own."""
        return None if self.decoding is None else self.decoding.cache()

    def group(self, step: Step, position: int) -> Hashable | None:
        """Steps with the same one can run together; None for a step that runs alone."""
        shared = self.possible and not (self.alone and self.decoding is None)
        short = 0 < step.rows * step.length <= SHORT_TOKENS
        return step.blocks if shared and short and step.mixes(position) else None

    def run(self, items: Sequence[BatchItem]) -> list[Outcome]:
        """The outputs, or the error, of each item; all are of one group."""
        outcomes: dict[int, Outcome] = {}
        calls: dict[Span, dict[Span, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, item in enumerate(items):
            try:
                span = item.state.span_for(item.step)
            except Exception as error:  # of this session alone
                outcomes[index] = error
            else:
                calls[span.host][span].append(index)
        for span, adapted in calls.items():
            # Those with the same adapter stand together: it is called once for all of them.
            members = [index for same in adapted.values() for index in same]
            for runner, some in self._parted(members, items):
                ran = _run_call(span, [items[index] for index in some], runner)
                outcomes.update(zip(some, ran, strict=True))
        return [outcomes[index] for index in range(len(items))]

    def _parted(
        self, members: Sequence[int], items: Sequence[BatchItem]
    ) -> list[tuple[Decoding | None, list[int]]]:
        """The calls that run some items: who makes each, and for which of them."""
        fast: list[int] = []
        calls: list[tuple[Decoding | None, list[int]]] = []
        if (decoding := self.decoding) is not None:
            fast = [index for index in members if decoding.takes(items[index])]
            shared = decoding.calls([items[index] for index in fast])
            calls = [(decoding, [fast[place] for place in some]) for some in shared]
        taken = set(fast)
        others = [index for index in members if index not in taken]
        if self.alone:
            return [*calls, *((None, [index]) for index in others)]
        return [*calls, (None, others)] if others else calls

    @classmethod
    @torch.inference_mode()
    def try_out(cls, span: Span, hidden_size: int) -> Batching:
        """What sessions of these blocks can share; runs a few tokens through all of them."""
        if not span.takes_positions or span.stretching:
            return cls()
        # The session of two rows has two new positions.
        sessions = trial_sessions(span, hidden_size, 2)
        items = [one.item(0, one.state.cache.rows, masked=True) for one in sessions]
        apart = [run_one(item)[0] for item in items]
        for item in items:
            item.state.cache.truncate(*item.step.blocks, item.position)
        parts = [item.state.batch_part(item.step, item.position) for item in items]
        try:
            with mixing.token_wise(span, sum(part.tokens for part in parts)) as found:
                together = _run_batch(span, items, parts)
        except Exception as error:  # whatever a decoder does with what it does not expect
            logger.info("steps of different sessions run one by one: %s", error)
            return cls()
        for alone, shared in zip(apart, together, strict=True):
            difference = (shared[0] - alone).float().norm() / alone.float().norm()
            if not is_close(difference, span.dtype):
                logger.info("steps of different sessions run one by one: together they differ")
                return cls()
        return cls(possible=True, token_wise=frozenset(found))


def _run_call(span: Span, items: Sequence[BatchItem], decoding: Decoding | None) -> list[Outcome]:
    """`Batching.run`, for items that can share a call of these blocks."""
    if len(items) == 1 and decoding is None:
        return [_alone(items[0])]
    began = time.perf_counter()
    outcomes: dict[int, Outcome] = {}
    parts: dict[int, Part] = {}
    for index, item in enumerate(items):
        try:
            parts[index] = item.state.batch_part(item.step, item.position)
        except Exception as error:  # of this session alone
            outcomes[index] = error
    ready = [items[index] for index in parts]
    shared: Sequence[Outcome]
    run = partial(_run_batch, span) if decoding is None else decoding.run
    try:
        shared = run(ready, list(parts.values())) if ready else []
    except Exception as error:
        logger.exception("a step of %d sessions failed; they run one by one", len(ready))
        if decoding is not None and isinstance(error, torch.OutOfMemoryError):
            decoding.drop_graphs()
            torch.cuda.empty_cache()
        elif decoding is not None and not isinstance(error, SwarmError):
            decoding.give_up(error, adapted=any(part.additions for part in parts.values()))
        shared = [_run_again(item) for item in ready]
    outcomes.update(zip(parts, shared, strict=True))
    for item in items:
        item.step.times.compute += time.perf_counter() - began
    return [outcomes[index] for index in range(len(items))]


def _alone(item: BatchItem) -> Outcome:
    try:
        return run_one(item)
    except Exception as error:  # belongs to who waits for this item
        return error


def _run_batch(
    span: Span, items: Sequence[BatchItem], parts: Sequence[Part]
) -> list[list[torch.Tensor]]:
    ids: list[int] = []
    for item in items:
        ids += _position_ids(item.step, item.position)
    wanted = sorted({index for item in items for index in item.step.states})
    outputs = span.run_batch(
        *items[0].step.blocks,
        [item.step.hidden for item in items],
        parts,
        position_ids=torch.tensor([ids], device=span.device),
        states=wanted,
    )
    results = []
    for item, (result, *states) in zip(items, outputs, strict=True):
        found = dict(zip(wanted, states, strict=True))
        own = [result, *(found[index] for index in item.step.states)]
        results.append([output.cpu() for output in own])
    return results


def _position_ids(step: Step, position: int) -> list[int]:
    """A step's position ids, row after row."""
    if step.position_ids is None:
        return list(range(position, position + step.length)) * step.rows
    own: list[int] = step.position_ids.expand(step.rows, -1).flatten().tolist()
    return own


def _run_again(item: BatchItem) -> Outcome:
    """An item by itself, after `join` has prepared it and a shared call has failed somewhere."""
    try:
        item.state.cache.truncate(*item.step.blocks, item.position)
        outputs = item.state.compute(item.step, item.position, item.begin, item.end)
        return [output.cpu() for output in outputs]
    except torch.OutOfMemoryError:
        return no_memory(item.step)
    except Exception as error:
        return error
