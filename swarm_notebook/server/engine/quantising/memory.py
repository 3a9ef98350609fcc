"""What was measured of a model's weights, remembered in the user's cache.

Blocks are known by the first row of every tensor of the first of them: revisions differ in them. A
whole model is known by its digest. Best effort: what is not remembered is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm_notebook.checkpoint.files.digest import digest
from swarm_notebook.checkpoint.files.weights import block_index

if TYPE_CHECKING:
    from swarm_notebook.checkpoint.files.source import ModelSource

logger: logging.Logger = logging.getLogger(__name__)


class Memory:
    """One thing to remember.

    Args:
        known: what it depends on; its `repr` counts.
    """

    def __init__(self, known: object):
        import platformdirs

        digest = hashlib.sha256(repr(known).encode()).hexdigest()
        folder = Path(platformdirs.user_cache_dir("swarm_notebook")) / "bits"
        self._path = folder / f"{digest[:32]}.json"

    @classmethod
    def of_blocks(cls, source: ModelSource, start: int, end: int, asked: object) -> Memory:
        """About blocks start..end-1 of a model.

        Args:
            asked: what it depends on beside the weights.
        """
        weights = source.weights()
        names = [name for name in weights.names() if block_index(name) == start]
        rows = hashlib.sha256()
        for name, lazy in sorted(weights.lazy(names).items()):
            rows.update(name.encode())
            rows.update(lazy[:1].float().numpy().tobytes())
        return cls((source.dht_prefix, start, end, asked, rows.hexdigest()))

    @classmethod
    def of_loss(cls, source: ModelSource, bits: float) -> Memory:
        """By how much a model's perplexity grows at so many bits per weight."""
        return cls(("perplexity", digest(source), bits))

    def read(self) -> Any:
        """What was remembered, as JSON has it; None if nothing was. It is not to be trusted."""
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None

    def write(self, what: Any) -> None:
        """Remember it."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self._path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(what))
            unfinished.replace(self._path)
        except OSError as error:
            logger.info("what was measured is not remembered: %s", error)
