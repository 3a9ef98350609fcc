"""One new position for many rows whose keys and values are in a pool, with nothing but tensors.

What a step needs to know (which lines each row sees, and where its new ones go) stands in tensors
of fixed shapes, so a decoder that is called with a `StepCache` can be captured in a CUDA graph, and
its blocks compiled (`steps.compiled`). As far as possible it stays the model's own code:

- `StepCache.update` only notes which block is running.
- The mask function, registered as `NAME`, evaluates the model's own rule (causal, windows, chunks)
  at the positions of the rows.
- The attention function of the same name files the new keys and values and attends to those that a
  row sees, by plain arithmetic or by `kernel`. It honours what models pass: ``scaling``,
  ``softcap``, ``s_aux`` (sinks of attention, one per head), grouped heads.

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

    pool: PagePool
    positions: torch.Tensor
    table: torch.Tensor | None
    new: torch.Tensor
    visible: torch.Tensor

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

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new states as they are: `attend` files them, in the block that is named here."""
        _running.block = layer_idx
        return key_states, value_states

    def places(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """In stores of so many heads: what is seen ``[heads, rows, length]``, and the new ones."""
        return self._places[heads]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.visible.shape[1], 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def seen(self, rule: Callable[..., torch.Tensor]) -> Seen:
        """What rows see by a model's rule."""
        rows = torch.arange(self.positions.shape[0], device=self.positions.device)
        allowed = rule(
            rows[:, None, None, None],
            rows.new_zeros(1, 1, 1, 1),
            self.positions[:, None, None],
            self._columns[None, None, None],
        )
        return Seen(allowed & self.visible[:, None, None])


class Seen:
    """What decoders get for a mask, and hand on to attention as it is.

    Attributes:
        visible: ``[rows, 1, 1, length]``, True where a row sees.
    """

    def __init__(self, visible: torch.Tensor):
        self.visible = visible


def _kernel() -> Any:
    # Triton comes with torch for GPUs only.
    from swarm_notebook.server.engine.attention import kernel

    return kernel


class _Running(threading.local):
    """The step of this thread, and where it is.

    Attributes:
        block: the one that attends next.
        seen: what its rows see.
    """

    cache: StepCache | None = None
    block: int = 0
    seen: Seen | None = None


_running = _Running()


@contextmanager
def stepping(cache: StepCache) -> Iterator[None]:
    """Let masks that this thread makes, and attention, be those of a step."""
    _running.cache = cache
    try:
        yield
    finally:
        _running.cache = _running.seen = None


def at_block(block: int, seen: Seen) -> None:
    """Name the block whose attention is called next, where the block does not do so itself."""
    _running.block, _running.seen = block, seen


def _mask(*, mask_function: Callable[..., torch.Tensor], **_: Any) -> Seen:
    return _present()[0].seen(mask_function)


def _present() -> tuple[StepCache, Seen | None]:
    cache = _running.cache
    if cache is None:
        raise RuntimeError("what belongs to steps of many rows was called outside of one")
    return cache, _running.seen


def _attention(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Seen,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """``[rows, 1, heads, head size]``."""
    _running.seen = attention_mask
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, s_aux, scaling=scaling, softcap=softcap), None


# An operator of torch, and all that changes with the step beside its arguments: so compiled blocks
# call it unseen, and are the same for every block and length.
@torch.library.custom_op("swarm_notebook::attend", mutates_args=())
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """File ``[rows, heads, 1, size]`` in the present block; attention to all that rows see.

    Returns:
        ``[rows, 1, heads, value size]``.
    """
    cache, seen = _present()
    if seen is None:
        raise RuntimeError("attention was called without a mask")
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    index = _running.block - cache.pool.start
    keys, values = cache.pool.keys[index], cache.pool.values[index]
    if cache.table is not None:
        kernel = _kernel()
        kernel.file(key, value, keys, values, cache.new)
        visible = seen.visible[:, 0, 0]
        found = kernel.attend(query, keys, values, cache.table, cache.positions, visible, **options)
        return found[:, None]
    lines, new = cache.places(keys.shape[0])
    return _arithmetic(
        query,
        _through(keys, key, lines, new),
        _through(values, value, lines, new),
        seen.visible[:, 0],
        **options,
    )


@attend.register_fake
def _(
    query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
) -> torch.Tensor:
    rows, heads = query.shape[:2]
    return value.new_empty(rows, 1, heads, value.shape[3])


def _through(
    store: torch.Tensor, states: torch.Tensor, lines: torch.Tensor, new: torch.Tensor
) -> torch.Tensor:
    """File ``[rows, heads, 1, size]``; all that may be seen, ``[rows, heads, length, size]``."""
    flat = store.flatten(0, 1)
    flat.index_copy_(0, new.flatten(), states[:, :, 0].transpose(0, 1).flatten(0, 1))
    seen = flat.index_select(0, lines.flatten()).unflatten(0, lines.shape)
    return seen.transpose(0, 1)


def _arithmetic(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    rows, heads, _length, size = query.shape
    groups = heads // key.shape[1]
    # By heads first, as the keys were gathered: their product needs no other copy.
    grouped = query.reshape(rows, -1, groups, size).transpose(0, 1)
    scores = grouped @ key.transpose(0, 1).transpose(-1, -2)
    scores = scores * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # Not infinite: a row that is all padding must stay finite, or its session never is again.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~visible[None], lowest)
    if sinks is not None:
        added = sinks.to(scores.dtype).view(-1, 1, groups, 1).expand(-1, rows, -1, -1)
        scores = torch.cat([scores, added], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    output = weights @ value.transpose(0, 1)
    return output.transpose(0, 1).reshape(rows, 1, heads, -1)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
