"""The handle to the keys and values that live on the servers, in the form of transformers' `Cache`.

Of remote blocks it holds no keys and values: it knows the length, the attention mask so far and
the session. Cropping, reordering and selecting rows are noted here and travel with the next
request. Keys and values of blocks at home are here, detached, and follow at once.

A cache is *lazy* when nobody asked for one (a plain ``model(ids)`` returns one all the same, as
every transformers model does): then the pass itself runs without any cache on the servers, and
only if the handle is used to continue are the servers' caches built, from the history.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from swarm_notebook.client.connection import Connection
from swarm_notebook.client.session.batch import BatchSession
from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.layout import Layout


@dataclass
class _Count:
    """How many tokens are in a cache; its layers know it also when the cache is gone."""

    tokens: int = 0


class RemoteLayer(DynamicLayer):
    """What transformers sees of one block's keys and values.

    They are here if the block is at home. Of a remote block there is only how many there are.
    """

    def __init__(self, count: _Count) -> None:
        self._count = count  # not the cache, whose end frees the servers' memory at once
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None
        super().__init__()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(length={self.get_seq_length()})"

    @property
    def _length(self) -> int:
        return self._count.tokens

    @property
    def is_initialized(self) -> bool:
        """Whether there is a token in it."""
        return self._length > 0

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Transformers' constructor sets it; the length decides."""

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys of a block at home, ``[batch, heads, length, head size]``; None before a pass."""
        return self._read(0)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._refuse_value(value)

    @property
    def values(self) -> torch.Tensor | None:
        """Values of a block at home, ``[batch, heads, length, head size]``; None before a pass."""
        return self._read(1)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._refuse_value(value)

    def _read(self, which: int) -> torch.Tensor | None:
        if self._held is not None:
            return self._held[which][..., : self._length, :]
        if self._length:
            raise Unsupported(_ELSEWHERE)
        return None

    def _refuse_value(self, value: torch.Tensor | None) -> None:
        if value is not None:
            raise Unsupported(_ELSEWHERE)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of all tokens, with new ones behind the tokens that the cache counts.

        What was left by a pass that did not come to its end is overwritten.

        Raises:
            Unsupported: the block did not see all earlier tokens.
        """
        length = self._length
        if length:
            if self._held is None or self._held[0].shape[-2] < length:
                raise Unsupported(
                    "past_key_values: a block at home has no keys and values of the tokens before; "
                    "start again without past_key_values"
                )
            old_keys, old_values = self.keys, self.values
            keys = torch.cat([old_keys, keys], dim=-2)  # type: ignore[list-item]
            values = torch.cat([old_values, values], dim=-2)  # type: ignore[list-item]
        self._held = (keys.detach(), values.detach())
        return keys, values

    def select(self, rows: torch.Tensor) -> None:
        """Keep (repeat, reorder) the given rows."""
        if self._held is not None:
            keys, values = self._held
            rows = rows.to(keys.device)
            self._held = keys.index_select(0, rows), values.index_select(0, rows)

    def twin(self, count: _Count) -> RemoteLayer:
        """The same for a copy of the cache."""
        twin = RemoteLayer(count)
        twin._held = self._held  # never changed in place
        return twin

    def get_seq_length(self) -> int:
        return self._length

    def reset(self) -> None:
        self._held = None


_ELSEWHERE = (
    "the keys and values of remote blocks are kept by their servers; those of a block at home "
    "can be read: swarm.own(block)"
)


class RemoteCache(Cache):
    """Keys and values of one batch of sequences on the servers of a swarm.

    Attributes:
        layout: the order of the blocks that it was filled by.
        leave: call it to free the servers' memory; the next use of the cache builds it again.
    """

    def __init__(
        self, connection: Connection, *, lazy: bool = False, max_length: int | None = None
    ):
        self._count = _Count()
        self._held = [RemoteLayer(self._count) for _ in range(connection.num_blocks)]
        super().__init__(layers=list(self._held))
        self.connection = connection
        self._max_length = max_length
        self.session: BatchSession = connection.session(max_length)
        self.lazy = lazy
        self.layout: Layout | None = None
        self.rows: int = -1
        self.mask: torch.Tensor | None = None
        # Garbage collection may run in any thread, so the streams are closed by their own loop.
        self.leave: Callable[[], object] = functools.partial(
            connection.network.loop.call_soon_threadsafe, self.session.close
        )
        weakref.finalize(self, self.leave).atexit = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_size={self.rows}, length={self.length})"

    def __deepcopy__(self, memo: dict[Any, Any]) -> RemoteCache:
        """A cache that goes its own way; the servers copy their part when it is next used."""
        memo[id(self)] = twin = RemoteCache(
            self.connection, lazy=self.lazy, max_length=self._max_length
        )
        twin.length, twin.rows, twin.layout, twin.mask = (
            self.length,
            self.rows,
            self.layout,
            self.mask,
        )
        twin._held = [layer.twin(twin._count) for layer in self._held]
        twin.layers = list(twin._held)
        twin.session.copy_from(self.session)
        return twin

    def __copy__(self) -> RemoteCache:
        return self.__deepcopy__({})

    @property
    def length(self) -> int:
        """How many tokens are in it."""
        return self._count.tokens

    @length.setter
    def length(self, tokens: int) -> None:
        self._count.tokens = tokens

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise Unsupported(
            "past_key_values of remote blocks are on their servers and cannot be saved; "
            "copy.deepcopy makes another one for the same notebook"
        )

    def continue_with(self, layout: Layout) -> None:
        """Note what fills it.

        Raises:
            Unsupported: other blocks, or in another order, than those that did before.
        """
        if self.length and self.layout is not None and self.layout != layout:
            raise Unsupported(
                "past_key_values: blocks came home, were released, or the list of blocks changed "
                "since it was filled; start again without past_key_values"
            )
        self.layout = layout

    def new_mask(self, attention_mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
        """The mask of ``new`` tokens to come, uint8, or None when nothing was ever masked.

        Raises:
            ValueError: the mask has another length than the cache and the new tokens.
            Unsupported: it changes tokens that are in the cache already.
        """
        if attention_mask is None:
            return None if self.mask is None else self.mask.new_ones(self.mask.shape[0], new)
        if attention_mask.shape[-1] != self.length + new:
            raise ValueError(
                f"attention_mask has length {attention_mask.shape[-1]}, expected "
                f"{self.length} cached + {new} new tokens = {self.length + new}"
            )
        mask = attention_mask.detach().to("cpu", torch.uint8)
        before = mask[:, : self.length]
        unchanged = before.all() if self.mask is None else torch.equal(before, self.mask)
        if not unchanged:
            raise Unsupported(
                "attention_mask changes tokens that are in the cache already; their keys are on "
                "the servers as they were computed. Start again without past_key_values"
            )
        return None if self.mask is None and mask.all() else mask[:, self.length :]

    def whole_mask(self, new: int) -> torch.Tensor | None:
        """The mask of all tokens when ``new`` come without one; None if nothing is masked."""
        if self.mask is None:
            return None
        return torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], new)], dim=1)

    def advance(self, rows: int, new: int, mask: torch.Tensor | None) -> None:
        """Count ``new`` tokens in, after all blocks have seen them."""
        if mask is not None:
            before = mask.new_ones(rows, self.length) if self.mask is None else self.mask
            self.mask = torch.cat([before, mask], dim=1)
        self.length += new
        self.rows = rows

    def _select(self, rows: torch.Tensor) -> None:
        rows = rows.detach().to("cpu", torch.int64)
        self.session.select(rows)
        self.rows = len(rows)
        if self.mask is not None:
            self.mask = self.mask[rows]
        for layer in self._held:
            layer.select(rows)

    # From here on: what transformers asks of a cache.

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a block at home calls; remote blocks never do."""
        return self._held[layer_idx].append(key_states, value_states)

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, None]]:
        for layer in self._held:
            yield layer.keys, layer.values, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    @property
    def max_cache_len(self) -> int:
        """No limit of its own; PEFT asks before it hands over the keys of prefix tuning."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def is_recording_past(self, layer_idx: int) -> bool:
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens (transformers 5: the number is <= 0)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to drop, not {tokens_to_remove}"
            )
        self.length = max(self.length + tokens_to_remove, 0)
        if self.mask is not None:
            self.mask = self.mask[:, : self.length]

    def reset(self) -> None:
        self.crop(-self.length)
        for layer in self.layers:
            layer.reset()
        self.leave()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = torch.as_tensor(indices)  # a list will do for the others, too
        self._select(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)

    @property
    def batch_size(self) -> int:
        return self.rows


def adopted(cache: Any, connection: Connection) -> Any:
    """A cache that the user made, as a handle to one on the servers if there is nothing in it yet.

    The object stays: whoever holds it goes on with it. What is no cache, or is filled, is given
    back as it is.
    """
    if not isinstance(cache, Cache) or isinstance(cache, RemoteCache) or cache.get_seq_length():
        return cache
    kind = type(cache).__name__
    longest = cache.get_max_length() if cache.layers else -1
    changed: Any = cache
    changed.__dict__.clear()
    changed.__class__ = RemoteCache
    changed.__init__(connection, max_length=longest if longest > 0 else None)
    warnings.warn(
        f"past_key_values: remote blocks keep their keys and values on their servers, so this "
        f"{kind} became a RemoteCache",
        stacklevel=2,
    )
    return changed
