"""One new position for many rows whose keys and values are in a pool, with nothing but tensors.

What a step needs to know (which lines each row sees, and where its new ones go) stands in tensors
of fixed shapes, so a decoder that is called with a `StepCache` can be captured in a CUDA graph, and
its blocks compiled. As far as possible it stays the model's own code:

- `StepCache.update` files the new keys and values and gathers those that a row sees.
- The mask function, registered as `NAME`, evaluates the model's own rule (causal, windows, chunks)
  at the positions of the rows.
- The attention function of the same name is plain arithmetic, or `kernel`. It honours what models
  pass: ``scaling``, ``softcap``, ``s_aux`` (sinks of attention, one per head), grouped heads.

Whether a model is right with it is tried, not looked up by name: see `steps.decode`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from swarm_notebook.server.engine.kv.pages import NOTHING, PagePool

NAME = "swarm_notebook_paged"


class StepCache(Cache):
    """Where the rows of a step find their keys and values, and file the new ones.

    Args:
        lines: ``[rows, length]``, in the order of positions.
        new: ``[rows]``, the lines of the new ones.
        positions: ``[rows, 1]``, how many precede them.
        padding: ``[rows, length]``, False for padding; None if there is none.
        table: ``[rows, pages]``, for `kernel`: then nothing is gathered; None: plain arithmetic.
    """

    is_compileable = True

    def __init__(
        self,
        pool: PagePool,
        lines: torch.Tensor,
        new: torch.Tensor,
        positions: torch.Tensor,
        padding: torch.Tensor | None = None,
        *,
        table: torch.Tensor | None = None,
    ):
        super().__init__(layers=[])
        self.pool, self.positions, self.table, self.new = pool, positions, table, new
        self._columns = torch.arange(lines.shape[1], device=lines.device)
        self.visible = self._columns <= positions
        if padding is not None:
            self.visible = self.visible & padding
        if table is not None:
            return
        lines = lines.where(self.visible, NOTHING)
        # The store of a block as rows of one head each: torch copies whole rows fast.
        self._places: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for heads in {shape.heads for shape in pool.shapes}:
            first = torch.arange(heads, device=lines.device)[:, None] * pool.lines
            self._places[heads] = (first[..., None] + lines), (first + new)

    def focus(self, start: int, end: int) -> int:
        return 0

    def of_block(self, block: int) -> BlockStep:
        """What concerns one block, in tensors."""
        index = block - self.pool.start
        keys, values = self.pool.keys[index], self.pool.values[index]
        return BlockStep(keys, values, *self._places[keys.shape[0]])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.table is not None:
            index = layer_idx - self.pool.start
            keys, values = self.pool.keys[index], self.pool.values[index]
            _kernel().file(key_states, value_states, keys, values, self.new)
            return keys[None], values[None]
        return self.of_block(layer_idx).update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.visible.shape[1], 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def mask(self, rule: Callable[..., torch.Tensor]) -> torch.Tensor:
        """``[rows, 1, 1, length]``, True where a row sees, by a model's rule."""
        rows = torch.arange(self.positions.shape[0], device=self.positions.device)
        seen = rule(
            rows[:, None, None, None],
            rows.new_zeros(1, 1, 1, 1),
            self.positions[:, None, None],
            self._columns[None, None, None],
        )
        return seen & self.visible[:, None, None]


class BlockStep:
    """The part of a step that concerns one block; a cache to a block that is called by itself."""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, lines: torch.Tensor, new: torch.Tensor
    ):
        self.keys, self.values, self.lines, self.new = keys, values, lines, new

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """File ``[rows, heads, 1, size]``; all that is seen, ``[rows, heads, length, size]``."""
        return self._through(self.keys, key_states), self._through(self.values, value_states)

    def _through(self, store: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        flat = store.flatten(0, 1)
        flat.index_copy_(0, self.new.flatten(), states[:, :, 0].transpose(0, 1).flatten(0, 1))
        seen = flat.index_select(0, self.lines.flatten()).unflatten(0, self.lines.shape)
        return seen.transpose(0, 1)


def _kernel() -> Any:
    # Triton comes with torch for GPUs only.
    from swarm_notebook.server.engine.attention import kernel

    return kernel


_running = threading.local()


@contextmanager
def stepping(cache: StepCache) -> Iterator[None]:
    """Let masks that this thread makes be those of a step."""
    _running.cache = cache
    try:
        yield
    finally:
        _running.cache = None


def _mask(*, mask_function: Callable[..., torch.Tensor], **_: Any) -> torch.Tensor:
    cache: StepCache | None = getattr(_running, "cache", None)
    if cache is None:
        raise RuntimeError("what belongs to steps of many rows was called outside of one")
    return cache.mask(mask_function)


def _attention(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """``[rows, 1, heads, head size]``."""
    cache: StepCache | None = getattr(_running, "cache", None)
    if cache is not None and cache.table is not None:
        output = _kernel().attend(
            query,
            key[0],
            value[0],
            cache.table,
            attention_mask[:, 0, 0],
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap,
            sinks=s_aux,
        )
        return output[:, None], None
    rows, heads, _length, size = query.shape
    groups = heads // key.shape[1]
    # By heads first, as the keys were gathered: their product needs no other copy.
    grouped = query.reshape(rows, -1, groups, size).transpose(0, 1)
    scores = grouped @ key.transpose(0, 1).transpose(-1, -2)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # Not infinite: a row that is all padding must stay finite, or its session never is again.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~attention_mask[:, 0][None], lowest)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(-1, 1, groups, 1).expand(-1, rows, -1, -1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    if s_aux is not None:
        weights = weights[..., :-1]
    output = weights @ value.transpose(0, 1)
    return output.transpose(0, 1).reshape(rows, 1, heads, -1), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
