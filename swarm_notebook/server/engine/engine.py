"""What the torch thread does for requests: passes forward and back, with or without adapters.

One `Engine` per server. Its methods are jobs of the torch thread and run nowhere else (but
`facts`); therefore nothing in here is locked. What a notebook leaves on the server, adapters and
kept activations, is filed under its peer id, so that no two notebooks ever see each other's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from swarm_notebook.errors import AdapterMissing
from swarm_notebook.server.adapters.injection import AdaptedSpan
from swarm_notebook.server.adapters.store import AdapterLimits, AdapterStore
from swarm_notebook.server.adapters.upload import Upload
from swarm_notebook.server.engine.passes import backward, cast, stateless
from swarm_notebook.server.engine.passes.activation_store import ActivationStore
from swarm_notebook.server.engine.passes.gradients import SpanGradients
from swarm_notebook.server.engine.passes.recording import AutogradPass, NoRoom, record
from swarm_notebook.server.engine.requests import Backward, Forward
from swarm_notebook.server.engine.scheduling.pieces import Pieces
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching

# Kinds of passes per span that are known to be too large to keep; beyond it they are learnt anew.
_MAX_OVERSIZED = 64


@dataclass
class _Adapter:
    """An adapter that is held, and which of its states."""

    span: AdaptedSpan
    version: int


class Engine:
    """Runs requests through a span and keeps what notebooks ask it to keep."""

    def __init__(
        self, span: Span, activation_bytes: int, accepted: AdapterLimits, batching: Batching
    ):
        self._span = span
        self.batching = batching
        self.adapters: AdapterStore[_Adapter] = AdapterStore(accepted)
        self._activations: ActivationStore[AutogradPass] = ActivationStore(activation_bytes)
        # By span and kind of pass, from how many rows x blocks on its activations are beyond the
        # budget: another adapter, length or mask leaves another number of bytes behind.
        self._oversized: WeakKeyDictionary[Span, dict[tuple[Any, ...], int]] = WeakKeyDictionary()

    def span_for(self, peer: str, request: Forward) -> Span:
        """The blocks to run a request through: the server's own, or with the peer's adapter.

        Raises:
            AdapterMissing: the adapter is not here in this version and for these blocks.
        """
        if request.adapter is None:
            return self._span
        name, version = request.adapter
        held = self.adapters.get((peer, name))
        start, end = request.blocks
        if held is None or held.version != version:
            has = "none of it" if held is None else f"version {held.version}"
            raise AdapterMissing(f"adapter {name!r}, version {version}: {has} is here, upload it")
        if start < held.span.start or held.span.end < end:
            raise AdapterMissing(
                f"adapter {name!r} is here for blocks [{held.span.start}, {held.span.end}) only, "
                f"upload it for [{start}, {end})"
            )
        return held.span

    def forward(self, peer: str, request: Forward) -> Pieces[list[torch.Tensor]]:
        """The outputs that a forward request wants, on the CPU.

        Returns:
            ``[rows, positions, hidden size]`` for the last block, then the states and the inner
            modules asked for.

        Raises:
            AdapterMissing: as `span_for`.
            BadRequest: an inner module is not there, or has no single tensor as its output.
        """
        span = self.span_for(peer, request)
        if request.dtype is not None and request.dtype != span.dtype:
            return (yield from cast.forward(span, request, request.dtype))
        found = yield from self._kept_forward(span, peer, request)
        if found is None:
            found = yield from stateless.forward(span, request)
        return found

    def _kept_forward(
        self, span: Span, peer: str, request: Forward
    ) -> Pieces[list[torch.Tensor] | None]:
        """The outputs of a pass that is kept for a backward; None if it is not to be, or cannot."""
        if request.keep is None or not self._can_keep(span, request):
            return None
        try:
            make_room = partial(self._activations.make_room, peer)
            recorded = yield from record(span, request, make_room)
        except NoRoom as error:
            if error.size > self._activations.total:
                self._learn_oversized(span, request)
            return None
        if recorded is None:
            return None
        graph, inner, kept = recorded
        self._activations.put((peer, request.keep), graph, kept)
        wanted = (request.blocks[1] - 1, *request.states)
        found = [*(graph.outputs[index].detach() for index in wanted), *inner]
        return [output.cpu() for output in found]

    def backward(self, peer: str, request: Backward) -> Pieces[SpanGradients]:
        """The gradients that a backward request wants, on the CPU (see `SpanGradients`).

        Raises:
            AdapterMissing: as `span_for`.
        """
        span = self.span_for(peer, request)
        if request.dtype is not None and request.dtype != span.dtype:
            return (yield from cast.gradients(span, request, request.dtype))
        key = (peer, request.kept or "")
        graph = self._activations.get(key) if request.kept else None
        if graph is None or not graph.serves(request):
            found = yield from backward.recompute(span, request)
        else:
            if request.release:
                self._activations.remove(key)
            found = yield from graph.gradients(request, keep=not request.release)
        return SpanGradients([gradient.cpu() for gradient in found.tensors], found.weights)

    def load_adapter(self, peer: str, upload: Upload) -> int:
        """Take over an adapter's new state; the bytes that it takes."""
        key = peer, upload.id
        held = self.adapters.get(key)
        if held is not None and held.span.recipe == upload.recipe:
            span = held.span
        else:
            self.adapters.make_room(key, upload.size)
            span = AdaptedSpan(self._span, upload, self.batching.token_wise)
        span.load(upload)
        self.adapters.put(key, _Adapter(span, upload.version), upload.size)
        # What was computed with other weights, or with modules that are gone, is of no use.
        live = [self._span, *(adapter.span for adapter in self.adapters.values())]
        self._activations.remove_if(lambda _, graph: graph.span is span or graph.span not in live)
        return upload.size

    def _can_keep(self, span: Span, request: Forward) -> bool:
        """Whether the activations of a pass may fit; False if such a pass was found not to."""
        size, kind = _size_and_kind(request)
        limit = self._oversized.get(span, {}).get(kind)
        return size > 0 and (limit is None or size < limit)

    def _learn_oversized(self, span: Span, request: Forward) -> None:
        size, kind = _size_and_kind(request)
        known = self._oversized.setdefault(span, {})
        if len(known) >= _MAX_OVERSIZED:
            known.clear()
        known[kind] = min(size, known.get(kind, size))

    def expire(self) -> None:
        """Forget what has not been used for long."""
        self._activations.expire()

    def facts(self) -> dict[str, Any]:
        """Budgets and what is taken of them; may be called from any thread."""
        return {
            "engine": self.batching.engine,
            "activation_bytes": self._activations.total,
            "activation_bytes_held": self._activations.held,
            "adapter_bytes": self.adapters.limits.bytes,
            "adapter_bytes_held": self.adapters.held,
            "adapters": len(self.adapters),
        }


def _size_and_kind(request: Forward) -> tuple[int, tuple[Any, ...]]:
    """What the bytes of activations grow with, and all else that they depend on within a span."""
    size = request.rows * request.length * (request.blocks[1] - request.blocks[0])
    prompted = 0 if request.prompts is None else request.prompts.shape[2]
    padded, dropout = request.attention_mask is not None, request.seed is not None
    return size, (request.length, prompted, padded, dropout)
