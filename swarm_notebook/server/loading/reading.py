"""Reading the blocks of a server, which may take minutes: how far it is, and how it ends early."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from swarm_notebook.checkpoint.files.source import ModelSource
from swarm_notebook.checkpoint.parts.partial import LoadedBlocks
from swarm_notebook.net.wire import tensors
from swarm_notebook.server.engine.quantising.loading import Quantised, load_within
from swarm_notebook.server.engine.steps.compiled import import_ahead
from swarm_notebook.server.memory import heap
from swarm_notebook.server.options import ServeOptions

logger: logging.Logger = logging.getLogger(__name__)

# Between two lines of the log, and two of a progress bar.
LOG_SECONDS = 2.0
TELL_SECONDS = 0.25


class _GivenUp(Exception):
    """Nobody wants the blocks any more."""


class Reading:
    """Reads blocks in the torch thread.

    Args:
        tell: gets how much of the weights was read, in bytes; None: only the log says so.
    """

    def __init__(
        self,
        source: ModelSource,
        options: ServeOptions,
        tell: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._source, self._options, self._tell = source, options, tell
        self._given_up = threading.Event()
        self._logged = self._told = 0.0

    def run(self) -> tuple[LoadedBlocks, Quantised | None]:
        """The blocks, and what was done to their weights; None if nothing was.

        Raises: as `load_within`.
        """
        options = self._options
        started = self._logged = time.monotonic()
        device = torch.device(options.device)
        if device.type == "cuda":
            if device.index is not None:
                # Kernels of Triton and captured graphs go where this thread is, not where tensors
                # are.
                torch.cuda.set_device(device)
            if not options.reproducible:  # whose blocks are not compiled
                import_ahead()
        start, end = options.blocks or (0, self._source.config().num_hidden_layers)
        with heap.apart():
            found = load_within(
                self._source,
                start,
                end,
                bits=options.bits,
                memory=options.memory,
                dtype=tensors.dtype_from_name(options.dtype),
                device=options.device,
                progress=self._progress,
            )
        logger.info("loaded blocks %d:%d in %.1f s", start, end, time.monotonic() - started)
        return found

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
