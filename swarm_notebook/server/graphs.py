"""Joined calls as graphs that run without Python.

A decode step is some hundred short operations, and calling them one by one from the layers' Python
takes longer than computing them (on small models and on GPUs) or a good part of it. Everything in
a joined call but attention and adapters has a shape that depends on the number of tokens alone
(`script`), so it can be recorded once per number of tokens and replayed (`recording`).

Recordings are made for the numbers of tokens in `SIZES`; what has fewer is filled up. They are made
when they have been wanted for a while, one block at a time: so the sessions that run meanwhile
wait for a moment, and never for all of it; blocks that are alike share what takes long. A recording
counts when it gives what the decoder gives and is not slower. Decoders that look at the values of
what they compute (rotations that stretch with the position) refuse to be recorded, and run as they
are.

Everything here belongs to the torch thread, but for the number of recordings.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch.nn import functional

from swarm_notebook.server import linear, recording
from swarm_notebook.server.attention import JoinedCache, Part
from swarm_notebook.server.linear import Products
from swarm_notebook.server.mixing import Site
from swarm_notebook.server.recording import Recording, Subject
from swarm_notebook.server.script import Unrecordable
from swarm_notebook.server.span import Span

logger = logging.getLogger(__name__)

SIZES = (1, 4, 8, 16, 32, 64)
# Making a recording takes as long as some dozens of steps: so many must have wanted it.
WANTED_STEPS = 12
# Measured so much slower it is not used; on a busy machine no more can be said after a few calls.
_SLOWER = 0.8
# How far replayed results may be from the decoder's, relative to their size.
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}
CLOSE_HALF = 5e-2


class Graph:
    """A run of blocks for up to ``tokens`` tokens."""

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
        outputs = recording.replay(self._recordings, hidden, position_ids, cache)
        start = self._recordings[0].subject.block
        wanted = [outputs[-1], *(outputs[index - start] for index in states)]
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
        # None: the block cannot be recorded, or it does not pay.
        self._recordings: dict[Subject, Recording | None] = {}
        # Those whose tapes others can share.
        self._first: dict[Hashable, Recording | None] = {}
        self._wanted: Counter[Subject] = Counter()
        # Those that are about to be made.
        self._growing: set[Subject] = set()

    def __len__(self) -> int:
        """How many were made that take time and memory."""
        # A copy: this may be asked from another thread, for what the server says of itself.
        made = list(self._recordings.values())
        return len({found.tape for found in made if found is not None})

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
        subjects = [Subject(block, size, bool(sites)) for block in range(start, end)]
        recordings = []
        for subject in subjects:
            found = self._recordings.get(subject)
            if found is None:
                if subject not in self._recordings:
                    self._wish(subject, subjects)
                return None
            recordings.append(found)
        if not all(site in recordings[site[0] - start].script.sites for site in sites):
            return None
        return Graph(self._span, size, recordings)

    def _wish(self, missing: Subject, subjects: Sequence[Subject]) -> None:
        if missing in self._growing:
            return
        self._wanted[missing] += 1
        if self._wanted[missing] == WANTED_STEPS:
            del self._wanted[missing]
            self._growing.update(subjects)
            self._advance(self._growth(subjects))

    def _advance(self, growth: Iterator[None]) -> None:
        """Let a growth go on later, until it pauses again."""

        def go_on() -> None:
            for _ in growth:
                self._advance(growth)
                break

        self._later(go_on)

    def _growth(self, subjects: Sequence[Subject]) -> Iterator[None]:
        """Make recordings; pauses whenever others may have waited for long enough."""
        for subject in subjects:
            if subject not in self._recordings:
                for weight in linear.weights_of(self._span.layer(subject.block)):
                    self._products.way(weight, subject.tokens)
                    yield
                self._recordings[subject] = self._made(subject)
                yield
            if self._recordings[subject] is None:
                # Runs with this block do without the others.
                break
        self._growing.difference_update(subjects)

    def _made(self, subject: Subject) -> Recording | None:
        """A recording, if the block can be recorded, comes out the same and faster."""
        key = self._span.likeness(subject.block), subject.tokens, subject.tuned
        if key in self._first:
            first = self._first[key]
            made = None if first is None else self._like(subject, first)
            if made is not None or first is None:
                return made
        made = self._new(subject)
        self._first.setdefault(key, made)
        return made

    def _new(self, subject: Subject) -> Recording | None:
        try:
            made = recording.record(self._span, subject, self._hidden_size, self._products)
        except Exception as error:  # whatever a decoder does with what it does not expect
            logger.info("%s cannot be recorded: %s", subject, error)
            return None
        gain = self._gain(made)
        return made if gain is not None and gain > _SLOWER else None

    def _like(self, subject: Subject, other: Recording) -> Recording | None:
        """One with the tape of another block, if that is right for this one, too."""
        try:
            made = recording.record_like(
                self._span, subject, self._hidden_size, self._products, other
            )
        except Unrecordable as error:
            logger.info("%s", error)
            return None
        return None if self._gain(made) is None else made

    def _gain(self, made: Recording) -> float | None:
        """How many times as fast as the decoder it is; None if it gives something else."""
        difference, gain = recording.try_out(self._span, made, self._hidden_size)
        logger.info("%s recorded: %.1e off, %.2f times as fast", made.subject, difference, gain)
        return gain if difference <= CLOSE.get(self._span.dtype, CLOSE_HALF) else None
