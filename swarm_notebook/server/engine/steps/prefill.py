"""A long step in chunks: the steps of other sessions come in between.

Each chunk is a job of the torch thread, and writes its outputs to where they belong in those of the
whole step. So nothing is left to put together when the last one is done.
"""

from __future__ import annotations

import time

import torch

from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.steps.session_state import (
    BatchItem,
    SessionState,
    run_one,
    run_where_it_is,
)
from swarm_notebook.server.memory.host import empty


class ChunkedPrefill:
    """A step of a session and how much of it is computed.

    Args:
        position: where the step begins in its session.

    Attributes:
        computed: how many of its positions are done.
        outputs: what `run_one` gives for the whole step, complete when ``finished``.
    """

    computed: int

    def __init__(self, state: SessionState, step: Step, position: int):
        self._state, self._step, self._position = state, step, position
        self.computed = 0
        self.outputs: list[torch.Tensor] = []

    @property
    def finished(self) -> bool:
        return self.computed == self._step.length

    @torch.inference_mode()
    def run(self, positions: int) -> None:
        """In the torch thread: compute the next ``positions``."""
        begin, end = self.computed, self.computed + positions
        item = BatchItem(self._state, self._step, self._position, begin, end)
        if positions == self._step.length:
            self.outputs = run_one(item)
        else:
            began = time.perf_counter()
            self._put(run_where_it_is(item), begin, end)
            self._step.times.compute += time.perf_counter() - began
        self.computed = end

    def _put(self, found: list[torch.Tensor], begin: int, end: int) -> None:
        """Write the outputs of positions ``[begin, end)`` to their places."""
        missing = [self._step.unwanted, *[0] * (len(found) - 1)]
        if not self.outputs:
            self.outputs = list(map(self._whole, found, missing))
        for whole, chunk, first in zip(self.outputs, found, missing, strict=True):
            whole[:, max(begin - first, 0) : max(end - first, 0)] = chunk

    def _whole(self, chunk: torch.Tensor, missing: int) -> torch.Tensor:
        shape = (chunk.shape[0], self._step.length - missing, *chunk.shape[2:])
        return empty(shape, chunk.dtype)
