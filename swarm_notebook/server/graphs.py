"""Joined calls as graphs that run without Python.

A decode step is some hundred short operations, and calling them one by one from the layers' Python
takes longer than computing them (on small models and on GPUs) or a good part of it. Everything in
a joined call but attention has a shape that depends on the number of tokens alone (`attention`),
so it can be recorded once per number of tokens and replayed: as TorchScript, made of what
`make_fx` saw the decoder do, with attention as an operator that calls back. The products with
weights are replaced by the fastest way of the machine (`linear`).

A recording is made for 1, 2, 4, … `MAX_TOKENS` tokens; what has fewer is filled up. It counts when
it gives what the decoder gives and is faster. Decoders that look at the values of what they compute
(experts that are chosen one by one, rotations that stretch with the position) refuse to be
recorded, and run as they are.

Everything here belongs to the torch thread.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from swarm_notebook.server import linear
from swarm_notebook.server.attention import (
    JoinedCache,
    Part,
    RecordingCache,
    Script,
    replayed,
)
from swarm_notebook.server.cache import SessionCache
from swarm_notebook.server.span import Span

logger = logging.getLogger(__name__)

MAX_TOKENS = 64
MAX_GRAPHS = 16
# A recording takes as long as some dozens of steps: so many must have wanted it.
WANTED_STEPS = 12
# How far replayed results may be from the decoder's, relative to their size.
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}
CLOSE_HALF = 5e-2
# How many positions precede what is recorded, and what a recording is tried out with.
_PAST, _TRIALS = 3, (4, 5, 6)

_LINEAR = torch.ops.aten.linear.default

# Blocks, and the number of tokens.
Key = tuple[int, int, int]


class Graph:
    """The blocks ``[start, end)`` for ``tokens`` tokens."""

    def __init__(
        self, function: Callable[..., Any], script: Script, original: str, key: Key, span: Span
    ):
        self._function, self._script, self._original = function, script, original
        self._start, self._end, self.tokens = key
        self._span = span

    @torch.inference_mode()
    def run(
        self,
        hidden: torch.Tensor,
        parts: Sequence[Part],
        *,
        position_ids: torch.Tensor,
        states: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """What `Span.compute` gives for ``[1, tokens, hidden size]`` of a joined call.

        Args:
            position_ids: ``[1, tokens]``.
            states: indices of the blocks whose outputs come back as well.
        """
        span, used = self._span, hidden.shape[1]
        cache = JoinedCache(parts)
        cache.focus(self._start, self._end)
        hidden = hidden.to(span.device, span.dtype)
        if used < self.tokens:
            hidden = nn.functional.pad(hidden, (0, 0, 0, self.tokens - used))
            position_ids = nn.functional.pad(position_ids, (0, self.tokens - used))
        with replayed(self._script, cache, self._original):
            outputs = self._function(hidden, position_ids)
        wanted = [outputs[-1], *(outputs[index - self._start] for index in states)]
        return [output[:, :used] for output in wanted]


class Graphs:
    """The recordings of a span.

    Args:
        later: does a call in the torch thread, soon.
    """

    def __init__(self, span: Span, hidden_size: int, later: Callable[[Callable[[], None]], None]):
        self._span, self._hidden_size, self._later = span, hidden_size, later
        self._graphs: OrderedDict[Key, Graph | None] = OrderedDict()
        self._wanted: Counter[Key] = Counter()
        self._packs = linear.Packs()

    def find(self, start: int, end: int, tokens: int) -> Graph | None:
        """The graph for so many tokens, if there is one; if not, it is wished for."""
        if tokens > MAX_TOKENS:
            return None
        key = start, end, 1 << (tokens - 1).bit_length()
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        self._wanted[key] += 1
        if self._wanted[key] == WANTED_STEPS:
            self._later(lambda: self.record(*key))
        return None

    def record(self, start: int, end: int, tokens: int) -> None:
        """Make a graph, if these blocks can be recorded and are faster then."""
        key = start, end, tokens
        self._wanted.pop(key, None)
        began = time.monotonic()
        try:
            graph = record(self._span, key, self._hidden_size, self._packs)
        except Exception as error:  # whatever a decoder does with what it does not expect
            logger.info("blocks %d:%d cannot be recorded: %s", start, end, error)
            graph = None
        self._graphs[key] = graph if graph is not None and self._pays(graph, key) else None
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        took = time.monotonic() - began
        logger.info("recorded blocks %d:%d for %d tokens in %.1f s", start, end, tokens, took)

    def _pays(self, graph: Graph, key: Key) -> bool:
        """Whether a recording gives what the decoder gives, in less time.

        It is tried with other states and positions than it was made with: a decoder that has
        looked at them comes out different.
        """
        start, end, tokens = key
        difference, quick, slow = 0.0, math.inf, math.inf
        for past in _TRIALS:
            hidden, ids = _input(self._hidden_size, tokens, past)
            part = _session(self._span, key, self._hidden_size, past)
            began = time.perf_counter()
            ours = graph.run(hidden, [part], position_ids=ids)[0].cpu()
            quick = min(quick, time.perf_counter() - began)
            part.cache.truncate(start, end, past)
            began = time.perf_counter()
            theirs = self._span.run_joined(start, end, [hidden], [part], position_ids=ids)[0][0]
            theirs = theirs.cpu()
            slow = min(slow, time.perf_counter() - began)
            distance = (ours - theirs).float().norm() / theirs.float().norm()
            difference = max(difference, float(distance))
        right = difference <= CLOSE.get(self._span.dtype, CLOSE_HALF)
        if not right or quick >= slow:
            why = "no faster" if right else f"different by {difference:.1e}"
            logger.info("blocks %d:%d are %s when they are recorded", start, end, why)
        return right and quick < slow


def record(span: Span, key: Key, hidden_size: int, packs: linear.Packs) -> Graph:
    """Record a joined call of one session."""
    start, end, tokens = key
    hidden, ids = _input(hidden_size, tokens, _PAST)
    part, script = _session(span, key, hidden_size, _PAST), Script()
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
        inputs = hidden.clone().to(span.device, span.dtype), ids.clone().to(span.device)
        with span.attending(start, end, cache, script) as original:
            graph = make_fx(call, pre_dispatch=True)(*inputs)
        _quicken(graph, tokens, packs)
        part.cache.truncate(start, end, _PAST)
        with replayed(script, JoinedCache([part]), original):
            function = torch.jit.trace(graph, inputs, check_trace=False)
    return Graph(function, script, original, key, span)


def _quicken(graph: GraphModule, tokens: int, packs: linear.Packs) -> None:
    """Multiply by each weight in the fastest way."""
    products: dict[tuple[torch.Size, bool], list[tuple[Node, torch.Tensor]]] = defaultdict(list)
    for node in graph.graph.nodes:
        if node.target is _LINEAR and node.args[1].op == "get_attr":
            weight = getattr(graph, node.args[1].target)
            products[weight.shape, len(node.args) > 2].append((node, weight))
    for found in products.values():
        way = linear.fastest([weight for _, weight in found], tokens, packs)
        for node, weight in found:
            if way is linear.plain:
                continue
            node.target = way
            if way is linear.packed:
                name = f"packed_{node.name}"
                graph.register_buffer(name, packs.of(weight))
                with graph.graph.inserting_before(node):
                    node.update_arg(1, graph.graph.get_attr(name))
    graph.recompile()


def _input(hidden_size: int, tokens: int, past: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[1, tokens, hidden size]`` and their positions."""
    noise = torch.Generator().manual_seed(past)
    hidden = torch.randn(1, tokens, hidden_size, generator=noise)
    return hidden, torch.arange(past, past + tokens)[None]


def _session(span: Span, key: Key, hidden_size: int, past: int) -> Part:
    """A session with some positions in its cache, to try things with."""
    start, end, tokens = key
    cache = SessionCache(span.start, span.end)
    cache.restart(1)
    cache.reserve(past + tokens)
    with torch.no_grad():
        span.compute(start, end, _input(hidden_size, past, 0)[0], cache=cache)
    return Part(cache, 1, tokens)
