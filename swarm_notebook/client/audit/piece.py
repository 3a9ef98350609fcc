"""A finished piece of work as it is replayed: input, answer, and what is known of both. Pure code.

Of a session it is everything from the first token on, as the history has it: one pass without a
cache gives what the steps gave. Only what the server in question has answered itself is compared.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from swarm_notebook.client.passes.backward import PassGradients
from swarm_notebook.client.request import Request, travelling
from swarm_notebook.client.servers.bits import packing_of
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.client.session.history import Computed, History, Pass
from swarm_notebook.net.dht.records import ServerSpan
from swarm_notebook.net.wire import tensors


@dataclass(frozen=True)
class Piece:
    """What a server was asked, and what it answered.

    Attributes:
        segment: the server and its blocks.
        request: ``hidden`` is float32 ``[rows, positions, hidden size]``, as the server got it.
        answer: of the same shape, as the notebook got it.
        counted: bool ``[rows, positions]``: what of it this server has answered.
        first: position of the first token that this server computed; 0 without a session.
        grad: of the output, ``[rows, positions, hidden size]``: the piece is a backward pass.
        gradients: what it gave then; ``answer`` is that of the input.
        when: it was made, in seconds of Unix time.
        rounded: what the values of the answer were rounded to on their way here.
    """

    segment: RouteSegment
    request: Request
    answer: torch.Tensor
    counted: torch.Tensor
    first: int = 0
    grad: torch.Tensor | None = None
    gradients: PassGradients | None = None
    when: float = field(default_factory=time.time)
    rounded: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        """How many tokens are compared."""
        return int(self.counted.sum())


def dtype_of(segment: RouteSegment) -> torch.dtype | None:
    """What a server says it computes in; None if audits cannot tell what that gives."""
    known = packing_of(segment) is not None
    return tensors.float_dtype(segment.span.info.torch_dtype) if known else None


def of_checkpoint(segment: RouteSegment) -> bool:
    """Whether a server says that its weights have the values of the checkpoint."""
    packing = packing_of(segment)
    return packing is not None and not any(packing)


def of_pass(
    segment: RouteSegment, request: Request, answer: torch.Tensor, compression: int, *, kept: bool
) -> Piece | None:
    """A pass without a cache; None if a replay would give something else.

    Args:
        request: what the server was asked.
        compression: of the hidden states on their way.
        kept: they were not rounded on their way.
    """
    packed = compression == tensors.FLOAT16 and not kept
    if request.seed is not None or (compression and not kept and not packed):
        return None
    hidden = request.hidden if kept else travelling(request.hidden, segment.span)
    hidden = hidden.half() if packed else hidden
    plain = replace(request, hidden=hidden.float(), states=(), inner=())
    known = torch.ones(answer.shape[:2], dtype=torch.bool)
    counted = known if request.mask is None else request.mask.bool()
    rounded = torch.float16 if packed else answer.dtype
    return Piece(segment, plain, answer, counted, rounded=rounded)


def of_backward(
    segment: RouteSegment, request: Request, grad: torch.Tensor, found: PassGradients
) -> Piece | None:
    """A backward pass; None if a replay would give something else.

    Args:
        request: what the server was asked; its input is not rounded on the way.
        grad: of the output, as it was sent.
        found: what came back.
    """
    if request.seed is not None or (request.adapter is not None and request.adapter.by_row):
        return None
    # Copies: training goes on, adds to gradients in place and moves the prompts.
    hidden, prompts = request.hidden.float().clone(), request.prompts
    prompts = None if prompts is None else prompts.clone()
    plain = replace(request, hidden=hidden, prompts=prompts, states=(), inner=())
    known = torch.ones(hidden.shape[:2], dtype=torch.bool)
    counted = known if request.mask is None else request.mask.bool()
    kept = PassGradients(
        found.input.clone(),
        prompts={block: one.clone() for block, one in found.prompts.items()},
        weights={name: one.clone() for name, one in found.weights.items()},
    )
    return Piece(
        segment,
        plain,
        kept.input,
        counted,
        grad=grad.float().clone(),
        gradients=kept,
        rounded=kept.input.dtype,
    )


def travelled(latest: Pass, together: Callable[[ServerSpan, ServerSpan], bool]) -> float:
    """Of the states that replays of a session's pass would send, how many it has sent itself.

    What servers hand over to each other the notebook sends to none.

    Args:
        together: whether one server hands over to another.
    """
    parts = sorted(latest.computed.items(), key=lambda part: part[0])
    handed = sum(
        after.start == end
        and end not in latest.edits
        and together(before.segment.span, after.segment.span)
        for (end, before), (_, after) in itertools.pairwise(parts)
    )
    return 1 - handed / (2 * len(parts)) if parts else 1.0


def of_session(history: History, computed: Computed, end: int, compression: int) -> Piece | None:
    """What a session's server has answered so far; None if it cannot be replayed as one pass.

    Args:
        computed: by whom the present pass was computed, up to block ``end``.
    """
    segment = computed.segment
    merged = list(history.replay(computed.start, end, history.current.end))
    if len(merged) != 1 or history.prompts is not None:
        # Deep prompts may be trained between the passes.
        return None
    if merged[0].input_of(computed.start) is None:
        return None
    answers, counted = [], []
    first: int | None = None
    for part in history.passes():
        answer, by = part.inputs.get(end), part.computed.get(end)
        own = by is not None and by.same_work(computed) and answer is not None
        if by is not None and own:
            first = part.position if first is None else first
        like = part.input_of(computed.start)
        if like is None:
            return None
        answers.append(answer if answer is not None and own else torch.zeros_like(like))
        known = torch.full(like.shape[:2], own)
        if by is not None:
            known[:, : max(by.answered - part.position, 0)] = False
        counted.append(known)
    request = history.request(computed.start, end, merged[0])
    of_end = replace(segment, start=computed.start, end=end)
    request = replace(request, position=0, rows_version=0)
    found = of_pass(of_end, request, torch.cat(answers, dim=1), compression, kept=False)
    if found is None:
        return None
    return replace(found, counted=found.counted & torch.cat(counted, dim=1), first=first or 0)
