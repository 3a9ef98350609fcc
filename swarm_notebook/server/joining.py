"""Steps of several sessions as one: which can be joined, how, and whether the model allows it.

`group` names the steps that can run as one: through the same blocks, whatever their adapters. A
step runs alone if something in it concerns the whole call: prompts that are added to its positions,
outputs of modules inside of blocks, dropout.

`run` computes a group in one call, and one more for each adapter that cannot be mixed in
(`mixing`). A session whose step turns out to be wrong gets its error alone; if the joined call
itself fails, its sessions run one by one, so that only the guilty one is hurt.

`try_out` tells whether a model's blocks can be joined at all (see `attention`): two sessions of
different shapes, one of them padded, must get the same together as apart. BLOOM and Falcon do not
call transformers' attention interface; rotations that stretch with the longest sequence of a call
would stretch for everybody in it. Such models run session by session.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from swarm_notebook.server import mixing
from swarm_notebook.server.attention import Part
from swarm_notebook.server.graphs import CLOSE, CLOSE_HALF, Graph
from swarm_notebook.server.requests import Step
from swarm_notebook.server.span import Span
from swarm_notebook.server.state import SessionState

logger = logging.getLogger(__name__)

# Beyond so many tokens (rows x positions) a step is compute of its own, which joining cannot share.
SHORT_TOKENS = 64

# How transformers names rotations that depend on the largest position of a call.
_STRETCHING = ("dynamic", "longrope")

# A session, its step, the position of the step, and the piece of it to compute.
Turn = tuple[SessionState, Step, int, int, int]


def group(step: Step, position: int, span: Span) -> Hashable | None:
    """Steps with the same one can run together; None for a step that runs alone."""
    prompted = step.prompts is not None and position < step.prompts.shape[2]
    if (
        not span.joins
        or not 0 < step.rows * step.length <= SHORT_TOKENS
        or prompted
        or step.inner
        or step.seed is not None
    ):
        return None
    return step.blocks


def run_one(
    state: SessionState, step: Step, position: int, begin: int, end: int
) -> list[torch.Tensor]:
    """A `Turn` by itself."""
    began = time.perf_counter()
    outputs = state.run(step, position, begin, end)
    step.times.compute += time.perf_counter() - began
    return outputs


def run(turns: Sequence[Turn]) -> list[list[torch.Tensor] | Exception]:
    """The outputs, or the error, of each turn; all are of one group."""
    outcomes: dict[int, list[torch.Tensor] | Exception] = {}
    calls: dict[Span, dict[Span, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (state, step, *_) in enumerate(turns):
        try:
            span = state.span_for(step)
        except Exception as error:  # of this session alone
            outcomes[index] = error
        else:
            calls[span.host][span].append(index)
    for span, adapted in calls.items():
        # Those with the same adapter are neighbours: it is asked once for all of them.
        members = [index for same in adapted.values() for index in same]
        ran = _run_call(span, [turns[index] for index in members])
        outcomes.update(zip(members, ran, strict=True))
    return [outcomes[index] for index in range(len(turns))]


def _run_call(span: Span, turns: Sequence[Turn]) -> list[list[torch.Tensor] | Exception]:
    """`run`, for turns that can share a call of these blocks."""
    graph = _graph(span, turns)
    if graph is None and len(turns) == 1:
        return [_alone(turns[0])]
    began = time.perf_counter()
    outcomes: dict[int, list[torch.Tensor] | Exception] = {}
    parts: dict[int, Part] = {}
    for index, (state, step, position, _, _) in enumerate(turns):
        try:
            parts[index] = state.join(step, position)
        except Exception as error:  # of this session alone
            outcomes[index] = error
    ready = [turns[index] for index in parts]
    try:
        joined = _run_joined(span, ready, list(parts.values()), graph)
    except Exception:
        logger.exception("a joined step of %d sessions failed; they run one by one", len(ready))
        joined = [_run_again(*turn) for turn in ready]
    outcomes.update(zip(parts, joined, strict=True))
    for _, step, *_ in turns:
        step.times.compute += time.perf_counter() - began
    return [outcomes[index] for index in range(len(turns))]


def _alone(turn: Turn) -> list[torch.Tensor] | Exception:
    try:
        return run_one(*turn)
    except Exception as error:  # belongs to who waits for this turn
        return error


def _graph(span: Span, turns: Sequence[Turn]) -> Graph | None:
    """The recording for turns of these blocks, if there is one."""
    if span.graphs is None:
        return None
    start, end = turns[0][1].blocks
    tokens = sum(step.rows * step.length for _, step, *_ in turns)
    tuned = {site for state, step, *_ in turns for site in state.span_for(step).tuners}
    sites = frozenset(site for site in tuned if start <= site[0] < end)
    return span.graphs.find(start, end, tokens, sites)


def _run_joined(
    span: Span, turns: Sequence[Turn], parts: Sequence[Part], graph: Graph | None = None
) -> list[list[torch.Tensor] | Exception]:
    if not turns:
        return []
    first = turns[0][1]
    ids: list[int] = []
    for _, step, position, _, _ in turns:
        ids += _position_ids(step, position)
    wanted = sorted({index for _, step, *_ in turns for index in step.states})
    outputs = span.run_joined(
        *first.blocks,
        [step.hidden for _, step, *_ in turns],
        parts,
        graph,
        position_ids=torch.tensor([ids], device=span.device),
        states=wanted,
    )
    results: list[list[torch.Tensor] | Exception] = []
    for (_, step, *_), (result, *states) in zip(turns, outputs, strict=True):
        found = dict(zip(wanted, states, strict=True))
        results.append([result, *(found[index] for index in step.states)])
    return results


def _position_ids(step: Step, position: int) -> list[int]:
    """A step's position ids, row after row."""
    if step.position_ids is None:
        return list(range(position, position + step.length)) * step.rows
    own: list[int] = step.position_ids.expand(step.rows, -1).flatten().tolist()
    return own


def _run_again(
    state: SessionState, step: Step, position: int, begin: int, end: int
) -> list[torch.Tensor] | Exception:
    """A turn by itself, after `join` has prepared it and a joined call has failed somewhere."""
    try:
        state.cache.truncate(*step.blocks, position)
        return state.compute(step, position, begin, end)
    except Exception as error:
        return error


@torch.inference_mode()
def try_out(span: Span, hidden_size: int) -> bool:
    """Whether sessions of these blocks can be joined; runs a few tokens through all of them.

    Also notes which modules' adapters can be mixed in (`Span.token_wise`).
    """
    if not span.takes_positions or any(
        word in kind for kind in span.rotations for word in _STRETCHING
    ):
        return False
    noise = torch.Generator().manual_seed(0)
    lengths = {1: (7, 1), 2: (4, 2)}  # rows: cached and new positions

    def prefilled(rows: int) -> tuple[SessionState, Step]:
        past, new = lengths[rows]
        hidden = torch.randn(rows, past + new, hidden_size, generator=noise)
        mask = torch.ones(rows, past + new, dtype=torch.int64)
        mask[1:, :2] = 0
        blocks = (span.start, span.end)
        state = SessionState(span, context=None)
        state.run(Step(blocks, hidden[:, :past], attention_mask=mask[:, :past]), 0, 0, past)
        return state, Step(blocks, hidden[:, past:], attention_mask=mask[:, past:])

    turns: list[Turn] = [
        (state, step, lengths[rows][0], 0, step.length)
        for rows in lengths
        for state, step in (prefilled(rows),)
    ]
    apart = [run_one(*turn)[0] for turn in turns]
    for state, step, position, _, _ in turns:
        state.cache.truncate(*step.blocks, position)
    parts = [state.join(step, position) for state, step, position, _, _ in turns]
    try:
        with mixing.token_wise(span, sum(part.tokens for part in parts)) as found:
            together = _run_joined(span, turns, parts)
    except Exception as error:  # whatever a decoder does with what it does not expect
        logger.info("steps of different sessions cannot be joined: %s", error)
        return False
    within = CLOSE.get(span.dtype, CLOSE_HALF)
    for alone, joined in zip(apart, together, strict=True):
        if isinstance(joined, Exception):
            return False
        difference = (joined[0] - alone).float().norm() / alone.float().norm()
        if not difference <= within:
            logger.info("steps of different sessions cannot be joined: they come out different")
            return False
    span.token_wise = frozenset(found)
    return True
