"""What the user holds of a store: the states of a list of texts, in its order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swarm_notebook.client.servers.routing import describe_blocks
from swarm_notebook.probing.store import INDEX_FILE, Key, ShardFolder, Shards, digest
from swarm_notebook.report.formatting import count, model_title

if TYPE_CHECKING:
    from swarm_notebook.probing.subject import Subject


class HiddenStates:
    """The states of a list of texts, in its order.

    ``states[block]`` is a matrix ``[texts, hidden]`` if the states were pooled to one vector per
    text; ``states.text(i, block)`` is what there is of one text, ``[tokens, hidden]``.

    Attributes:
        blocks: what was read.
        key: the model, the dtype and what else they depend on.
        manifest: the record of the run, if they came from a swarm.
        subject: the model that they were collected from, unless they were read back from a store.
    """

    blocks: list[int]
    key: Key
    manifest: dict[str, Any] | None
    subject: Subject | None

    def __init__(
        self,
        shards: Shards,
        texts: Sequence[bytes],
        blocks: Sequence[int],
        subject: Subject | None = None,
    ):
        self._shards, self._texts, self.blocks = shards, texts, list(blocks)
        self.key, self.manifest, self.subject = shards.key, shards.manifest, subject

    def __len__(self) -> int:
        return len(self._texts)

    def __repr__(self) -> str:
        kept = f"{self.key.pool} of tokens" if self.key.pool == "mean" else f"{self.key.pool} token"
        return (
            f"<HiddenStates of {model_title(self.key.model)}: {count(len(self), 'text')}, "
            f"{describe_blocks(self.blocks)}, {kept if self.key.pool else 'all tokens'}, "
            f"{self.key.dtype}>"
        )

    def __getitem__(self, block: int) -> torch.Tensor:
        """All texts at one block, ``[texts, hidden]``.

        Raises:
            ValueError: the states were not pooled.
        """
        if self.key.pool is None:
            raise ValueError(
                "these states are per token; take states.text(i, block), or collect them with "
                'pool="last" or pool="mean"'
            )
        loaded: dict[int, torch.Tensor] = {}
        rows = [self._rows(index, block, loaded) for index in range(len(self))]
        return torch.cat(rows)

    def text(self, index: int, block: int) -> torch.Tensor:
        """The states of one text at one block: one row per token, or one row if pooled."""
        return self._rows(index, block, {})

    def _rows(self, index: int, block: int, loaded: dict[int, torch.Tensor]) -> torch.Tensor:
        place = self._shards.place(self._texts[index], block)
        if place is None:
            raise LookupError(
                f"block {block} of text {index} was not collected; there is "
                f"{describe_blocks(self.blocks)}"
            )
        shard, first, rows = place
        if id(shard) not in loaded:
            loaded[id(shard)] = shard.load(block)
        return loaded[id(shard)][first : first + rows]


def load_states(
    store: str | os.PathLike[str],
    texts: str | Iterable[str | Sequence[int]] | None = None,
    **wanted: Any,
) -> HiddenStates:
    """Read a store back, without a model.

    Args:
        store: the folder that was given to `hidden_states`.
        texts: which texts, in which order; None is all, in the order of their writing.
        wanted: fields of the key (``model``, ``dtype``, ``pool``, …), if the store has several.

    Raises:
        FileNotFoundError: nothing is there that fits.
        ValueError: more than one thing fits.
    """
    keys = {
        path.parent: Key(**json.loads(path.read_text(encoding="utf-8"))["key"])
        for path in sorted(Path(store).glob(f"*/{INDEX_FILE}"))
    }
    fitting = [
        (folder, key)
        for folder, key in keys.items()
        if all(getattr(key, name) == value for name, value in wanted.items())
    ]
    if not fitting:
        listed = "; ".join(map(str, keys.values())) or "nothing"
        raise FileNotFoundError(f"{store} has no states with {wanted}; it has {listed}")
    if len(fitting) > 1:
        listed = "; ".join(f"{folder.name}: {key}" for folder, key in fitting)
        raise ValueError(
            f"{store} has several that match: {listed}. Name model=…, dtype=… or pool=…; states of "
            "one key by different models (other weights, steering, …) are read with "
            "hidden_states, by the model"
        )
    shards = ShardFolder(*fitting[0])
    if isinstance(texts, str):
        texts = [texts]
    digests = shards.texts if texts is None else [digest(text) for text in texts]
    return HiddenStates(shards, digests, shards.blocks)
