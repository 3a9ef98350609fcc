"""A model over servers in this process, and the same held locally: what they say must be equal."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.hosting import HostedSwarm

import swarm_notebook as sn
from swarm_notebook.swarm import Swarm

TOLERANCE = 1e-4  # contract C2's
SPANS = ((0, 2), (2, 5))  # of the tiny Llama


def local_model(folder: Path) -> Any:
    """In float32, and frozen as a remote one is."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


class Connected:
    """A notebook's part of a swarm, and what tests put into its model."""

    swarm: Swarm

    @property
    def remote(self) -> Any:
        return self.swarm.model

    def ids(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.remote.config.vocab_size, (rows, length), generator=generator)

    def padded(self) -> dict[str, torch.Tensor]:
        """Three prompts of different lengths, padded on the left."""
        return padded(self.ids(3, 12))


@dataclass
class Pair(Connected):
    """A connected swarm, and the model that it serves.

    Attributes:
        kind: of the model, where a test has several.
    """

    swarm: Swarm
    folder: Path
    kind: str = ""
    local: Any = field(init=False)

    def __post_init__(self) -> None:
        self.local = local_model(self.folder)

    def models(self) -> list[Any]:
        """A remote and a local model that no test has changed."""
        return [copy.deepcopy(self.remote), copy.deepcopy(self.local)]


@contextmanager
def pair_of(
    folder: Path, spans: Sequence[tuple[int, int]] = SPANS, *, kind: str = "", **options: Any
) -> Iterator[Pair]:
    """Servers of the model in a folder, connected.

    Args:
        options: of `sn.connect`.
    """
    with (
        HostedSwarm(folder, spans) as servers,
        sn.connect(servers.initial_peers, model=folder, **options) as swarm,
    ):
        yield Pair(swarm, folder, kind)


def padded(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Three rows ``[3, length]``, the second and third with 5 and 9 tokens of padding in front."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, pads in enumerate((0, 5, 9)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
