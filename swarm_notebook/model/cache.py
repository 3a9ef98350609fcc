"""The handle to the keys and values that live on the servers, in the form of transformers' `Cache`.

It holds no tensors of keys and values: it knows the length, the attention mask so far and the
session. Cropping, reordering and selecting rows are noted here and travel with the next request.

A cache is *lazy* when nobody asked for one (a plain ``model(ids)`` returns one all the same, as
every transformers model does): then the pass itself runs without any cache on the servers, and
only if the handle is used to continue are the servers' caches built, from the history.
"""

from __future__ import annotations

import functools
import weakref

import torch
from transformers.cache_utils import Cache

from swarm_notebook.client.connection import Connection
from swarm_notebook.errors import Unsupported


class RemoteCache(Cache):
    """Keys and values of one batch of sequences on the servers of a swarm.

    Attributes:
        leave: call it to free the servers' memory; the next use of the cache builds it again.
    """

    def __init__(
        self, connection: Connection, *, lazy: bool = False, max_length: int | None = None
    ):
        super().__init__(layers=[])
        self.connection = connection
        self.session = connection.session(max_length)
        self.lazy = lazy
        self.length = 0
        self.rows = -1
        self.mask: torch.Tensor | None = None
        # Garbage collection may run in any thread, so the streams are closed by their own loop.
        self.leave = functools.partial(
            connection.network.loop.call_soon_threadsafe, self.session.close
        )
        weakref.finalize(self, self.leave).atexit = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_size={self.rows}, length={self.length})"

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

    # From here on: what transformers asks of a cache.

    def update(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise Unsupported("the keys and values of remote blocks are kept by their servers")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

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
        self.leave()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    @property
    def batch_size(self) -> int:
        return self.rows
