"""The keys and values of a text, kept from one run of ``generate`` to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swarm_notebook.writing.draft import common_prefix

_ROOM = 2048  # tokens that a text may have, at least, without asking Petals' servers for more


class KeysAndValues:
    """What a model has computed for the beginning of a text.

    A remote model gives a cache that is a handle to its servers' memory; it can always be cut back.
    A local one has transformers' `DynamicCache`. Where that cannot be cut back exactly (a sliding
    window that has begun to slide, recurrent states), or where the model has no such cache at all,
    the text is computed again.
    """

    def __init__(self, model: Any):
        self._model = model
        self._remote = hasattr(model, "new_cache")
        self._cache: Any = None
        self._ids: list[int] = []

    def known(self, ids: Sequence[int]) -> int:
        """How many of ``ids`` need not be computed; the last one always must be."""
        if self._cache is None:
            return 0
        held = self._ids[: self._cache.get_seq_length()]
        return max(0, min(common_prefix(held, ids), len(ids) - 1))

    def prepare(self, ids: Sequence[int], new: int) -> Any:
        """The cache to give to the model along with ``ids``, or None if it makes its own.

        Args:
            new: how many tokens are to be written.
        """
        keep = self.known(ids)
        extra = self._cache.get_seq_length() - keep if self._cache is not None else 0
        if extra and (keep == 0 or not _exact(self._cache)):
            self.forget()
            extra = 0
        if self._cache is None:
            self._cache = self._new(max(_ROOM, 2 * (len(ids) + new)))
        if extra:
            self._cache.crop(-extra)
        self._ids = list(ids)
        return self._cache

    def settle(self, ids: Sequence[int]) -> None:
        """Note what has been written after a run, whether or not all of it was computed."""
        self._ids = list(ids)

    def broken(self) -> None:
        """The model failed in the middle. A remote cache counts only what all blocks have seen."""
        if not self._remote:
            self.forget()

    def forget(self) -> None:
        """Let go of the memory, here or on the servers."""
        if self._remote and self._cache is not None:
            self._cache.leave()
        self._cache, self._ids = None, []

    def latest(self) -> dict[str, float]:
        """The seconds that each server took in the latest pass, with the network there and back."""
        step = self._cache.session.latest if self._remote and self._cache is not None else None
        if step is None:
            return {}
        seconds: dict[str, float] = {}
        for hop in step.hops:
            took = hop.serialisation + hop.network + hop.queue + hop.compute
            seconds[hop.name] = seconds.get(hop.name, 0.0) + took
        # With parts of a long prompt they work at the same time: each gets its share.
        share = min(1.0, (step.ended - step.began) / max(sum(seconds.values()), 1e-9))
        return {name: share * took for name, took in seconds.items()}

    def servers(self) -> frozenset[str]:
        """Peers that have had a part in the keys and values; empty where nothing is audited."""
        cached = self._remote and self._cache is not None
        return self._cache.session.peers if cached else frozenset()

    def lost(self) -> int:
        """How many servers were lost since the cache was made."""
        return self._cache.session.failovers if self._remote and self._cache is not None else 0

    def _new(self, room: int) -> Any:
        if self._remote:
            return self._model.new_cache(max_length=room)
        from transformers import DynamicCache

        if not self._model._supports_default_dynamic_cache():
            return None
        return DynamicCache(config=self._model.config.get_text_config(decoder=True))


def _exact(cache: Any) -> bool:
    """Whether cutting the cache back leaves it as if the rest had never been there."""
    full = [
        layer
        for layer in cache.layers
        if layer.is_sliding and layer.get_seq_length() >= layer.sliding_window
    ]
    return cache.is_croppable and not full
