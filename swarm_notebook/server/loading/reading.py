"""Reading the blocks of a server, which may take minutes: how far it is, and how it ends early.

A server that goes to other blocks has some of them already: those are not read again, and take no
memory again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from swarm_notebook.checkpoint.files.source import ModelSource
from swarm_notebook.checkpoint.packed import storages
from swarm_notebook.checkpoint.parts.partial import LoadedBlocks, block_of_zeros, joined
from swarm_notebook.net.wire import tensors
from swarm_notebook.server.engine.quantising.loading import Quantised, load_within
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.startup import rehearse
from swarm_notebook.server.engine.steps.compiled import import_ahead
from swarm_notebook.server.memory import heap
from swarm_notebook.server.options import ServeOptions

logger: logging.Logger = logging.getLogger(__name__)

# Between two lines of the log, and two of a progress bar.
LOG_SECONDS = 2.0
TELL_SECONDS = 0.25


class _GivenUp(Exception):
    """Nobody wants the blocks any more."""


@dataclass(frozen=True)
class Read:
    """Blocks that were read.

    Attributes:
        quantised: what was done to their weights; None: nothing.
    """

    blocks: LoadedBlocks
    quantised: Quantised | None

    @property
    def nbytes(self) -> int:
        """What their weights take."""
        layers = self.blocks.layers
        found = {
            storage.data_ptr(): storage.nbytes()
            for tensor in (*layers.parameters(), *layers.buffers())
            for storage in storages(tensor)
        }
        return sum(found.values())

    def part(self, start: int, end: int) -> Read:
        """Some of the blocks, with modules of their own; in the torch thread that runs these."""
        return replace(self, blocks=self.blocks.part(start, end))


class Reading:
    """Reads blocks in the torch thread.

    Args:
        tell: gets how much of the weights was read, in bytes; None: only the log says so.
        kept: some of the blocks, which are used up; None: all are to be read.
    """

    def __init__(
        self,
        source: ModelSource,
        options: ServeOptions,
        tell: Callable[[dict[str, Any]], None] | None,
        kept: Read | None,
    ) -> None:
        self._source, self._options, self._tell, self._kept = source, options, tell, kept
        self._given_up = threading.Event()
        self._logged = self._told = 0.0

    def run(self) -> Read:
        """The blocks.

        Raises: as `load_within`.
        """
        options = self._options
        started = self._logged = time.monotonic()
        device = torch.device(options.device)
        start, end = options.blocks or (0, self._source.config().num_hidden_layers)
        with self._rehearsal(start, device):
            if (kept := self._kept) is None:
                found = self._load(start, end, options.memory)
            else:
                memory = None if options.memory is None else options.memory - kept.nbytes
                sides = [(start, kept.blocks.start), (kept.blocks.end, end)]
                before, after = (
                    [self._load(*side, memory).blocks] if side[0] < side[1] else []
                    for side in sides
                )
                blocks = joined(self._source, [*before, kept.blocks, *after])
                found = replace(kept, blocks=blocks)
        logger.info("loaded blocks %d:%d in %.1f s", start, end, time.monotonic() - started)
        return found

    @contextmanager
    def _rehearsal(self, block: int, device: torch.device) -> Iterator[None]:
        """On a card, run what its first requests will beside the reading, with a block of zeros."""
        if device.type != "cuda":
            yield
            return
        _to(device)
        if not self._options.reproducible:  # whose blocks are not compiled
            import_ahead()
        if self._kept is not None:  # this process has served others
            yield
            return
        thread = self._rehearsing(block, device)
        try:
            yield
        finally:
            if thread is not None:
                thread.join()

    def _rehearsing(self, block: int, device: torch.device) -> threading.Thread | None:
        """A thread that is at it; its block takes memory until it is done, and nobody holds it."""
        dtype = tensors.dtype_from_name(self._options.dtype)
        try:
            # Here: like all models, it is constructed by this thread.
            one = block_of_zeros(self._source, block, dtype=dtype, device=device)
        except Exception as error:  # the blocks themselves are made in another way
            logger.info("no rehearsal beside the reading: %s", error)
            return None
        thread = threading.Thread(target=_rehearse, args=(one, device), name="rehearsal")
        thread.start()
        return thread

    def _load(self, start: int, end: int, memory: int | None) -> Read:
        options = self._options
        with heap.apart():
            return Read(
                *load_within(
                    self._source,
                    start,
                    end,
                    bits=options.bits,
                    memory=memory,
                    dtype=tensors.dtype_from_name(options.dtype),
                    device=options.device,
                    progress=self._progress,
                )
            )

    def give_up(self) -> None:
        """Let `run` end soon, with an error."""
        self._given_up.set()

    def _progress(self, done: int, total: int) -> None:
        if self._given_up.is_set():
            raise _GivenUp
        now = time.monotonic()
        if self._tell and (now - self._told > TELL_SECONDS or done == total):
            self._told = now
            self._tell({"weights_read": done, "weights": total})
        if now - self._logged > LOG_SECONDS:
            self._logged = now
            logger.info("read %d of %d MB of weights", done >> 20, total >> 20)


def _to(device: torch.device) -> None:
    """Kernels of Triton and captured graphs go where their thread is, not where tensors are."""
    if device.index is not None:
        torch.cuda.set_device(device)


def _rehearse(one: LoadedBlocks, device: torch.device) -> None:
    """In a thread of its own."""
    try:
        _to(device)
        rehearse(Span(one.decoder, one.layers_name, one.start), one.config.hidden_size)
    except Exception as error:  # the blocks themselves are tried later
        logger.info("a rehearsal beside the reading failed: %s", error)
