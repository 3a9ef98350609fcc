"""A joined call of some blocks, recorded: the operations that it consists of, without Python.

What `make_fx` sees the decoder do becomes TorchScript, in which attention is an operator that calls
back (`script`). The products with weights are replaced by the fastest way of the machine
(`linear`).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from swarm_notebook.server import linear, torchscript
from swarm_notebook.server.attention import JoinedCache, Part
from swarm_notebook.server.cache import SessionCache
from swarm_notebook.server.mixing import module_at, tunable
from swarm_notebook.server.script import RecordingCache, Script, replayed
from swarm_notebook.server.span import Span

# How many positions precede what is recorded, and what a recording is tried out with.
_PAST, _TRIALS = 3, (4, 5, 6)

_LINEAR = torch.ops.aten.linear.default

_optimized: Any = torch.jit.optimized_execution  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Extent:
    """What is recorded: blocks ``[start, end)`` for so many tokens.

    Attributes:
        tuned: whether adapters of the sessions may tune it.
    """

    start: int
    end: int
    tokens: int
    tuned: bool = False


@dataclass(slots=True)
class Recording:
    """A call of the blocks of an extent.

    Attributes:
        function: takes hidden states and position ids, gives the output of each block.
        script: what it must ask anew.
        original: how the model attends.
    """

    extent: Extent
    function: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
    script: Script
    original: str

    def run(
        self,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        cache: JoinedCache,
    ) -> tuple[torch.Tensor, ...]:
        """The output of each block for ``[1, tokens, hidden size]``, as ``cache``'s sessions."""
        cache.focus(self.extent.start, self.extent.end)
        # Optimising would compile kernels on the way, and round differently than the decoder.
        with _optimized(False), replayed(self.script, cache, self.original):
            return self.function(hidden, position_ids)


def record(span: Span, extent: Extent, hidden_size: int, products: linear.Products) -> Recording:
    """Record a call of one session."""
    start, end = extent.start, extent.end
    hidden, ids = _input(span, extent.tokens, hidden_size, _PAST)
    part, script = _session(span, extent, hidden_size, _PAST), Script()
    cache = RecordingCache([part])

    def call(hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inner = range(start, end - 1)
        result, *states = span.compute(
            start, end, hidden, cache=cache, position_ids=ids, states=inner
        )
        return (*states, result)

    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        # TorchScript is deprecated, and nothing else runs a graph without Python or a compiler.
        warnings.simplefilter("ignore")
        with span.attending(start, end, cache, script) as original, _opened(span, extent, script):
            graph = make_fx(call, pre_dispatch=True)(hidden, ids)
        _quicken(graph, extent.tokens, products)
        function = torchscript.function(graph)
    return Recording(extent, function, script, original)


@contextmanager
def _opened(span: Span, extent: Extent, script: Script) -> Iterator[None]:
    """Let a recording for adapters ask at every module that one may tune."""
    with ExitStack() as stack:
        for site in tunable(span, extent.start, extent.end) if extent.tuned else ():
            hook = script.open(site, extent.tokens)
            stack.callback(module_at(span, site).register_forward_hook(hook).remove)
        yield


def _quicken(graph: GraphModule, tokens: int, products: linear.Products) -> None:
    """Multiply by each weight in the fastest way."""
    for node in graph.graph.nodes:
        if node.target is not _LINEAR or node.args[1].op != "get_attr":
            continue
        weight = getattr(graph, node.args[1].target)
        node.target = products.way(weight, tokens)
        if node.target is linear.packed:
            name = f"packed_{node.name}"
            graph.register_buffer(name, products.pack(weight))
            with graph.graph.inserting_before(node):
                node.update_arg(1, graph.graph.get_attr(name))
    graph.recompile()


@torch.inference_mode()
def try_out(span: Span, recording: Recording, hidden_size: int) -> tuple[float, float]:
    """How far a recording is from the decoder, relative to the size, and how many times as fast.

    It is tried with other states and positions than it was made with: a decoder that has looked at
    them comes out different.
    """
    extent = recording.extent
    start, end = extent.start, extent.end
    difference, ours, theirs = 0.0, math.inf, math.inf
    for past in _TRIALS:
        hidden, ids = _input(span, extent.tokens, hidden_size, past)
        part = _session(span, extent, hidden_size, past)
        began = time.perf_counter()
        recorded = recording.run(hidden, ids, JoinedCache([part]))[-1].cpu()
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
def _session(span: Span, extent: Extent, hidden_size: int, past: int) -> Part:
    """A session with some positions in its cache, to try things with."""
    cache = SessionCache(span.start, span.end)
    cache.restart(1)
    cache.reserve(past + extent.tokens)
    before, _ = _input(span, past, hidden_size, 0)
    span.compute(extent.start, extent.end, before, cache=cache)
    return Part(cache, 1, extent.tokens)
