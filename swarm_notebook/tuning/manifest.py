"""How an adapter or a probe was made, in a small JSON file beside it."""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from swarm_notebook.swarm import Swarm

MANIFEST_FILE = "swarm_run.json"
_PACKAGES = ("swarm-notebook", "torch", "transformers", "peft", "hivemind")


def describe_run(swarm: Swarm) -> dict[str, Any]:
    """Model, revision, route, dtypes, versions and seed of a run, as it stands now."""
    config = swarm.model.config
    status, route = swarm.status(), swarm.route()
    servers = {row.peer_id: row for row in status.servers}
    return {
        "model": swarm.name,
        "revision": getattr(config, "_commit_hash", None),
        "architecture": (config.architectures or [type(swarm.model).__name__])[0],
        "blocks": status.num_blocks,
        "local_dtype": str(swarm.model.dtype).removeprefix("torch."),
        "route": [
            {
                "blocks": hop.blocks,
                "server": hop.name,
                "peer": hop.peer_id,
                "dtype": servers[hop.peer_id].precision if hop.peer_id in servers else None,
                "version": servers[hop.peer_id].version if hop.peer_id in servers else None,
            }
            for hop in route.hops
        ],
        "versions": {name: _version(name) for name in _PACKAGES},
        "seed": torch.initial_seed(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def save_adapter(swarm: Swarm, model: Any, folder: str | Path) -> Path:
    """Save a PEFT model's adapter as PEFT does, with the manifest of the run beside it.

    Args:
        swarm: what the model was trained on.
        model: the PEFT model around ``swarm.model``.
        folder: where to; made if missing.

    Returns:
        the folder.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    text = json.dumps(describe_run(swarm), indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
    return folder


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
