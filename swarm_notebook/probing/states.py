"""Hidden states of thousands of texts: batch by batch through the model, shard by shard to disk.

Texts become rows padded on the right: a decoder's tokens never see what follows, so a text's
states do not depend on its neighbours. Within a shard, texts of similar length share a batch. The
model is left as soon as the last wanted block has spoken, so no logits are made.

What the store has already is not computed again: a lost swarm or a restarted kernel costs at most
the shard that was being made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from swarm_notebook.model.home import Blocks
from swarm_notebook.probing.identity import hooked, sample
from swarm_notebook.probing.store import Key, Shards, digest, folder_for
from swarm_notebook.probing.subject import Subject, Target
from swarm_notebook.probing.view import HiddenStates
from swarm_notebook.progress import Waiting
from swarm_notebook.report.formatting import model_title
from swarm_notebook.tuning.manifest import describe_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger: logging.Logger = logging.getLogger(__name__)

Pool: TypeAlias = Literal["last", "mean"]

# A shard is what a lost swarm or a restarted kernel costs at most, and is held in memory until it
# is written.
SHARD_TEXTS = 256
SHARD_BYTES = 2**27


def hidden_states(
    target: Target,
    texts: str | Iterable[str | Sequence[int]],
    *,
    blocks: Blocks | None = None,
    batch_size: int = 16,
    store: str | os.PathLike[str] | None = None,
    pool: Pool | None = None,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    tag: str = "",
    shard_texts: int = SHARD_TEXTS,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> HiddenStates:
    """Collect hidden states for texts.

    Args:
        target: a swarm or a model.
        texts: one, or any number of them or of their token ids; taken one after another.
        blocks: whose output: a block, a list, a range or a slice; None is all, negative numbers
            count from the end.
        batch_size: texts per pass.
        store: a folder to keep the states in and to resume from; None keeps them in memory. A
            model whose states have changed (other weights, steering, deep prompts, …) gets a
            folder of its own in it; one with forward hooks of your own is not stored without
            ``tag``.
        pool: one vector per text, its last token's or the mean of all; None keeps every token.
        dtype: to keep them in; None is the model's.
        max_length: cut texts to so many tokens.
        tag: a name for what else the states depend on, such as an adapter or a steering hook;
            states with different tags are kept apart.
        shard_texts: how many texts are finished at a time; fewer if they fill 128 MiB.
        tokenizer: for a model alone; a swarm has its own.

    Returns:
        the states in the order of the texts; those on disk are mapped, not loaded.

    Raises:
        ValueError: a text has no tokens, or a PEFT adapter is active and no tag names it.
        BlocksOutOfRange: the model does not have a block.
    """
    subject = Subject.of(target, tokenizer)
    chosen, dtype = subject.chosen(blocks), dtype or subject.model.dtype
    if store is not None and not tag and getattr(subject.model, "peft_config", None):
        raise ValueError(
            "tag: the model has an adapter; name it, so that its states are kept apart"
        )
    if pool not in (None, "last", "mean"):
        raise ValueError(f'pool: {pool!r}; use "last", "mean" or None')
    key = Key(
        subject.name,
        getattr(subject.model.config, "_commit_hash", None),
        subject.precision,
        str(dtype).removeprefix("torch."),
        pool,
        max_length,
        tag,
    )
    shards = Shards(key)
    if store is not None:
        where = None if tag else hooked(subject)
        if where is None:
            shards = folder_for(store, key, sample(subject))
        else:
            logger.warning(
                "%s has a forward hook, on which the states may depend: they are neither read from "
                "%s nor kept there; name what it does with tag=…",
                where,
                store,
            )
    work = _Work(subject, shards, chosen, batch_size, pool, dtype, max_length, shard_texts)
    order = work.through([texts] if isinstance(texts, str) else texts)
    return HiddenStates(shards, order, chosen, subject)


@dataclass
class _Work:
    """One call: the texts that wait for their shard, and how it is computed."""

    subject: Subject
    shards: Shards
    blocks: list[int]
    batch_size: int
    pool: Pool | None
    dtype: torch.dtype
    max_length: int | None
    shard_texts: int
    done: int = 0  # texts
    described: bool = False
    missing: list[int] = field(default_factory=list)
    # Digest and token ids; a text that comes twice waits once.
    waiting: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def through(self, texts: Iterable[str | Sequence[int]]) -> list[bytes]:
        """Take all texts through; returns their digests."""
        order = []
        total = len(texts) if isinstance(texts, Sized) else None
        what = f"Hidden states of {model_title(self.subject.name)}"
        waiting = Waiting(what, total=total, unit="texts", count=lambda: self.done)
        with self.shards.writing(), waiting:
            for index, text in enumerate(texts):
                name = digest(text)
                order.append(name)
                self._take(index, name, text)
            self._finish()
        return order

    def _take(self, index: int, name: bytes, text: str | Sequence[int]) -> None:
        missing = [block for block in self.blocks if self.shards.place(name, block) is None]
        if not missing or name in self.waiting:
            self.done += 1
            return
        try:
            ids = self.subject.ids(text)[: self.max_length]
        except ValueError as error:
            raise ValueError(f"texts[{index}]: {error}") from error
        if self.waiting and (missing != self.missing or self._is_full(ids)):
            self._finish()
        self.missing = missing
        self.waiting[name] = ids

    def _is_full(self, ids: torch.Tensor) -> bool:
        rows = [1 if self.pool else len(one) for one in (*self.waiting.values(), ids)]
        hidden = self.subject.model.config.get_text_config().hidden_size
        size = sum(rows) * len(self.missing) * hidden * self.dtype.itemsize
        return len(self.waiting) >= self.shard_texts or size > SHARD_BYTES

    def _finish(self) -> None:
        """Compute the shard of the texts that wait, and file it."""
        if not self.waiting:
            return
        texts = list(self.waiting.values())
        kept: dict[int, list[Any]] = {block: [None] * len(texts) for block in self.missing}
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for first in range(0, len(texts), self.batch_size):
            batch = by_length[first : first + self.batch_size]
            states = _read(self.subject, [texts[index] for index in batch], self.missing)
            for block, state in states.items():
                for row, index in enumerate(batch):
                    kept[block][index] = self._pooled(state[row, : len(texts[index])])
            self.done += len(batch)
        lengths = [1 if self.pool else len(ids) for ids in texts]
        whole = {block: torch.cat(rows) for block, rows in kept.items()}
        self.shards.add(list(self.waiting), lengths, whole)
        self.waiting = {}
        if not self.described and self.subject.swarm is not None:
            self.shards.describe(describe_run(self.subject.swarm))
            self.described = True

    def _pooled(self, state: torch.Tensor) -> torch.Tensor:
        if self.pool == "last":
            state = state[-1:]
        elif self.pool == "mean":
            state = state.float().mean(0, keepdim=True)
        # A copy: a view would keep the states of the whole batch.
        return state.to("cpu", self.dtype, copy=True)


class _Enough(Exception):
    """Leaves the model once the last wanted block has spoken."""


def _read(
    subject: Subject, texts: Sequence[torch.Tensor], blocks: Sequence[int]
) -> dict[int, torch.Tensor]:
    """The states ``[texts, tokens, hidden]`` of a batch, padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([len(one) for one in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()

    def leave(_state: torch.Tensor) -> torch.Tensor:
        raise _Enough

    with (
        subject.at_rest() as model,
        subject.reading(blocks) as states,
        subject.editing(blocks[-1], leave),
    ):
        try:
            model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
            )
        except _Enough:
            return {block: state[:, -ids.shape[1] :] for block, state in states.items()}
    raise RuntimeError(f"{subject.name}: its forward did not run block {blocks[-1]}")
