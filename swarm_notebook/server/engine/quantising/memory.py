"""What was measured of a model's weights, remembered in the user's cache.

They are known by the first row of every tensor of the first block: revisions differ in them. Best
effort: what is not remembered is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm_notebook.checkpoint.files.weights import block_index

if TYPE_CHECKING:
    from swarm_notebook.checkpoint.files.source import ModelSource

logger = logging.getLogger(__name__)


class Memory:
    """One thing to remember about blocks start..end-1.

    Args:
        asked: what it depends on beside the weights; its `repr` counts.
    """

    def __init__(self, source: ModelSource, start: int, end: int, asked: object):
        import platformdirs

        weights = source.weights()
        names = [name for name in weights.names() if block_index(name) == start]
        digest = hashlib.sha256(repr((source.dht_prefix, start, end, asked)).encode())
        for name, lazy in sorted(weights.lazy(names).items()):
            digest.update(name.encode())
            digest.update(lazy[:1].float().numpy().tobytes())
        folder = Path(platformdirs.user_cache_dir("swarm_notebook")) / "bits"
        self._path = folder / f"{digest.hexdigest()[:32]}.json"

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
