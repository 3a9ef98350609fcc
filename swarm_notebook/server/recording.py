"""A joined call of a block, recorded: the operations that it consists of, without Python.

What `make_fx` sees the decoder do becomes a `tape` of TorchScript, in which attention is an
operator that calls back (`script`). Making one takes as long as some dozens of steps. Blocks that
are alike (`alike`) share it: what each of them must ask anew comes out when it is called once.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from swarm_notebook.server import tape
from swarm_notebook.server.attention import JoinedCache, Part
from swarm_notebook.server.cache import SessionCache
from swarm_notebook.server.joined_call import JoinedCall, Masks, running
from swarm_notebook.server.linear import Products
from swarm_notebook.server.mixing import module_at, tunable
from swarm_notebook.server.script import RecordingCache, Script, Unrecordable, masks_for
from swarm_notebook.server.span import Span
from swarm_notebook.server.tape import Tape

# How many positions precede what is recorded, and what a recording is tried out with.
_PAST, _TRIALS = 3, (4, 5, 6)

_optimized: Any = torch.jit.optimized_execution  # type: ignore[attr-defined]

_Call = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is recorded: a block for so many tokens.

    Attributes:
        tuned: whether adapters of the sessions may tune it.
    """

    block: int
    tokens: int
    tuned: bool = False

    def __str__(self) -> str:
        adapters = " with adapters" if self.tuned else ""
        return f"block {self.block} for {self.tokens} tokens{adapters}"


@dataclass(slots=True, eq=False)
class Recording:
    """A call of a block.

    Attributes:
        tensors: the block's, as the tape takes them.
        script: what it must ask anew.
        original: how the model attends.
    """

    subject: Subject
    tape: Tape
    tensors: list[torch.Tensor]
    script: Script
    original: str


def replay(
    recordings: Sequence[Recording],
    hidden: torch.Tensor,
    position_ids: torch.Tensor,
    cache: JoinedCache,
) -> list[torch.Tensor]:
    """The outputs of successive blocks for ``[1, tokens, hidden size]``, as ``cache``'s sessions.

    Args:
        position_ids: ``[1, tokens]``.
    """
    cache.focus(recordings[0].subject.block, recordings[-1].subject.block + 1)
    call = JoinedCall(cache, recordings[0].original)
    # What blocks with the same tape share.
    ahead: dict[Tape, tuple[tuple[torch.Tensor, ...], list[Masks]]] = {}
    outputs = []
    # Optimising would compile kernels on the way, and round differently than the decoder.
    with _optimized(False), running(call):
        for each in recordings:
            own, call.script = each.tape, each.script
            if own not in ahead:
                ahead[own] = own.ahead(position_ids, *own.constants), masks_for(call)
            early, call.masks = ahead[own]
            (hidden,) = own.body(hidden, position_ids, *early, *each.tensors)
            outputs.append(hidden)
    return outputs


def record(span: Span, subject: Subject, hidden_size: int, products: Products) -> Recording:
    """Record a call of one session."""
    script, layer = Script(), span.layer(subject.block)
    hidden, ids = _input(span, subject.tokens, hidden_size, _PAST)
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        # TorchScript is deprecated, and nothing else runs a graph without Python or a compiler.
        warnings.simplefilter("ignore")
        with _scripted(span, subject, hidden_size, script) as (call, original):
            graph = make_fx(call, pre_dispatch=True)(hidden, ids)
        made = tape.from_graph(graph, layer, subject.tokens, products)
    return Recording(subject, made, made.tensors_of(layer, products), script, original)


@torch.inference_mode()
def record_like(
    span: Span, subject: Subject, hidden_size: int, products: Products, other: Recording
) -> Recording:
    """Record a call of a block that is like another one, for as many tokens.

    Raises:
        Unrecordable: it does not ask for the same things.
    """
    script, layer = Script(), span.layer(subject.block)
    hidden, ids = _input(span, subject.tokens, hidden_size, _PAST)
    with _scripted(span, subject, hidden_size, script) as (call, original):
        call(hidden, ids)
    if script.outline() != other.script.outline():
        raise Unrecordable(f"{subject} is not like block {other.subject.block}")
    tensors = other.tape.tensors_of(layer, products)
    return Recording(subject, other.tape, tensors, script, original)


@contextmanager
def _scripted(
    span: Span, subject: Subject, hidden_size: int, script: Script
) -> Iterator[tuple[_Call, str]]:
    """A call of the block that writes down what it asks, and how the model attends."""
    start, end = subject.block, subject.block + 1
    cache = RecordingCache([_session(span, subject, hidden_size, _PAST)])

    def call(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return span.compute(start, end, hidden, cache=cache, position_ids=ids)[0]

    with span.attending(start, end, cache, script) as original, ExitStack() as stack:
        for site in tunable(span, start, end) if subject.tuned else ():
            hook = script.open(site, subject.tokens)
            stack.callback(module_at(span, site).register_forward_hook(hook).remove)
        yield call, original


@torch.inference_mode()
def try_out(span: Span, recording: Recording, hidden_size: int) -> tuple[float, float]:
    """How far a recording is from the decoder, relative to the size, and how many times as fast.

    It is tried with other states and positions than it was made with: a decoder that has looked at
    them comes out different.
    """
    subject = recording.subject
    start, end = subject.block, subject.block + 1
    difference, ours, theirs = 0.0, math.inf, math.inf
    for past in _TRIALS:
        hidden, ids = _input(span, subject.tokens, hidden_size, past)
        part = _session(span, subject, hidden_size, past)
        began = time.perf_counter()
        recorded = replay([recording], hidden, ids, JoinedCache([part]))[0].cpu()
        ours = min(ours, time.perf_counter() - began)
        part.cache.truncate(start, end, past)
        began = time.perf_counter()
        plain = span.run_joined(start, end, [hidden], [part], position_ids=ids)[0][0].cpu()
        theirs = min(theirs, time.perf_counter() - began)
        distance = (recorded - plain).float().norm() / plain.float().norm()
        difference = max(difference, float(distance))
    return difference, theirs / ours


def _input(
    span: Span, tokens: int, hidden_size: int, past: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[1, tokens, hidden size]`` and their positions."""
    noise = torch.Generator().manual_seed(past)
    hidden = torch.randn(1, tokens, hidden_size, generator=noise)
    ids = torch.arange(past, past + tokens)[None]
    return hidden.to(span.device, span.dtype), ids.to(span.device)


@torch.no_grad()
def _session(span: Span, subject: Subject, hidden_size: int, past: int) -> Part:
    """A session with some positions in its cache, to try things with."""
    cache = SessionCache(span.start, span.end)
    cache.restart(1)
    cache.reserve(past + subject.tokens)
    before, _ = _input(span, past, hidden_size, 0)
    span.compute(subject.block, subject.block + 1, before, cache=cache)
    return Part(cache, 1, subject.tokens)
