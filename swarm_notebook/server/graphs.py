"""Joined calls as graphs that run without Python.

A decode step is some hundred short operations, and calling them one by one from the layers' Python
takes longer than computing them (on small models and on GPUs) or a good part of it. Everything in
a joined call but attention and adapters has a shape that depends on the number of tokens alone
(`script`), so it can be recorded once per number of tokens and replayed (`recording`).

Recordings are made for the numbers of tokens in `SIZES`; what has fewer is filled up. They are made
when they have been wanted for a while, `CHUNK` blocks at a time: so the sessions that run meanwhile
wait for a moment, and never for all of it. A recording counts when it gives what the decoder gives
and is not slower. Decoders that look at the values of what they compute (rotations that stretch
with the position) refuse to be recorded, and run as they are.

Everything here belongs to the torch thread.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from swarm_notebook.server import recording
from swarm_notebook.server.attention import JoinedCache, Part
from swarm_notebook.server.linear import Products
from swarm_notebook.server.mixing import Site
from swarm_notebook.server.recording import Extent, Recording
from swarm_notebook.server.span import Span

logger = logging.getLogger(__name__)

SIZES = (1, 4, 8, 16, 32, 64)
CHUNK = 4
# Each takes about a megabyte, and a third of a second to make. None makes way for another: whoever
# asks for ever new runs of blocks must not keep the server busy with recording them.
MAX_RECORDINGS = 256
# Making a recording takes as long as some dozens of steps: so many must have wanted it.
WANTED_STEPS = 12
# Measured so much slower it is not used; on a busy machine no more can be said after a few calls.
_SLOWER = 0.8
# How far replayed results may be from the decoder's, relative to their size.
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}
CLOSE_HALF = 5e-2


class Graph:
    """A run of blocks for up to ``tokens`` tokens, as recordings of its parts."""

    def __init__(self, span: Span, tokens: int, recordings: Sequence[Recording]):
        self._span, self._tokens, self._recordings = span, tokens, recordings

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
        used, cache = hidden.shape[1], JoinedCache(parts)
        hidden = hidden.to(self._span.device, self._span.dtype)
        if used < self._tokens:
            hidden = functional.pad(hidden, (0, 0, 0, self._tokens - used))
            position_ids = functional.pad(position_ids, (0, self._tokens - used))
        outputs: list[torch.Tensor] = []
        for each in self._recordings:
            outputs += each.run(hidden, position_ids, cache)
            hidden = outputs[-1]
        start = self._recordings[0].extent.start
        wanted = [hidden, *(outputs[index - start] for index in states)]
        return [output[:, :used] for output in wanted] if used < self._tokens else wanted


class Graphs:
    """The recordings of a span.

    Args:
        products: how to multiply by the span's weights.
        later: does a call in the torch thread, soon.
    """

    def __init__(
        self,
        span: Span,
        hidden_size: int,
        products: Products,
        later: Callable[[Callable[[], None]], None],
    ):
        self._span, self._hidden_size = span, hidden_size
        self._products, self._later = products, later
        # None: these blocks cannot be recorded, or it does not pay.
        self._recordings: dict[Extent, Recording | None] = {}
        self._wanted: Counter[Extent] = Counter()

    def __len__(self) -> int:
        """How many there are."""
        return sum(found is not None for found in self._recordings.values())

    def find(
        self, start: int, end: int, tokens: int, sites: frozenset[Site] = frozenset()
    ) -> Graph | None:
        """The graph for so many tokens, if there is one; if not, it is wished for.

        Args:
            sites: the modules that are tuned by adapters of the sessions.
        """
        size = next((size for size in SIZES if tokens <= size), None)
        if size is None:
            return None
        whole = Extent(start, end, size, tuned=bool(sites))
        recordings = []
        for extent in _chunks(whole):
            found = self._recordings.get(extent)
            if found is None:
                if extent not in self._recordings:
                    self._wish(whole)
                return None
            recordings.append(found)
        if sites and not {site for found in recordings for site in found.script.sites} >= sites:
            return None
        return Graph(self._span, size, recordings)

    def _wish(self, whole: Extent) -> None:
        if len(self._recordings) >= MAX_RECORDINGS:
            return
        self._wanted[whole] += 1
        if self._wanted[whole] == WANTED_STEPS:
            self._later(lambda: self._grow(whole))

    def _grow(self, whole: Extent) -> None:
        """Make a recording, and the others later."""
        if self._record_next(whole):
            self._later(lambda: self._grow(whole))
        else:
            del self._wanted[whole]

    def _record_next(self, whole: Extent) -> bool:
        """Make the first recording that is missing; whether more are to be made."""
        missing = [extent for extent in _chunks(whole) if extent not in self._recordings]
        if not missing:
            return False
        made = self._made(missing[0])
        self._recordings[missing[0]] = made
        return made is not None and len(missing) > 1

    def _made(self, extent: Extent) -> Recording | None:
        """A recording, if these blocks can be recorded, come out the same and faster."""
        what = f"blocks {extent.start}:{extent.end} for {extent.tokens} tokens"
        what += " with adapters" if extent.tuned else ""
        try:
            made = recording.record(self._span, extent, self._hidden_size, self._products)
        except Exception as error:  # whatever a decoder does with what it does not expect
            logger.info("%s cannot be recorded: %s", what, error)
            return None
        difference, gain = recording.try_out(self._span, made, self._hidden_size)
        right = difference <= CLOSE.get(self._span.dtype, CLOSE_HALF)
        logger.info("%s recorded: %.1e off, %.2f times as fast", what, difference, gain)
        return made if right and gain > _SLOWER else None


def _chunks(whole: Extent) -> list[Extent]:
    return [
        replace(whole, start=first, end=min(first + CHUNK, whole.end))
        for first in range(whole.start, whole.end, CHUNK)
    ]
