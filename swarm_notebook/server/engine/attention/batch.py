"""One call of a decoder for the tokens of many sessions: every weight is read once for all.

The tokens of all sessions are laid end to end as *one row* ``[1, tokens, hidden]``. Everything in a
block works token by token (projections, norms, rotations by position, experts), except for
attention, and there transformers asks functions that are registered by name. Ours, registered as
`NAME`, take the row apart: each session's keys and values are filed in its own cache, and its
queries go, with its own mask, to the very function that the model would have called for that
session alone. So windows, soft caps, sinks and grouped heads are the model's own code, and nothing
here knows an architecture.

Masks are made once per call and kind of block: the mask function calls the model's own once per
session and returns the list, as one object, which the decoder hands on to attention unseen.

Whether an architecture plays along (calls the interface, hands the mask on, mixes tokens nowhere
else) is not known by name but tried: see `steps.batching`.

`BatchCache.attend` is the place for a kernel that reads all sessions at once, where a call per
session and block costs more than on a CPU.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig

from swarm_notebook.server.adapters.low_rank import Additions
from swarm_notebook.server.adapters.mixing import Mixture, Tuners
from swarm_notebook.server.engine.kv.cache import SessionCache

NAME = "swarm_notebook_batch"


@dataclass(slots=True, eq=False)
class Part:
    """One session's tokens in a batch.

    Attributes:
        cache: where its keys and values are filed.
        rows, length: its new tokens.
        padding: ``[rows, cached + new positions]``, 0 for padding; None if there is none.
        past: how many positions precede the new ones, in the blocks of the call.
        tuners: the layers of its adapter, if it has one.
        additions: what its adapter adds, if that can be told in a table.
    """

    cache: SessionCache
    rows: int
    length: int
    padding: torch.Tensor | None = None
    past: int = 0
    tuners: Tuners = field(default_factory=dict)
    additions: Additions | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class BatchCache(Cache):
    """The caches of several sessions, as one to the decoder.

    To the decoder it is empty: positions and masks come per session from elsewhere.
    """

    def __init__(self, parts: Sequence[Part]):
        super().__init__(layers=[])
        self.parts = parts
        # Keys and values of every part in the block that is running.
        self.stored: list[tuple[torch.Tensor, torch.Tensor]] = []

    @functools.cached_property
    def mixture(self) -> Mixture:
        """The adapters of the sessions."""
        return Mixture([(part.tuners, part.tokens) for part in self.parts])

    def focus(self, start: int, end: int) -> None:
        """Name the blocks of the call."""
        for part in self.parts:
            part.past = part.cache.focus(start, end)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """File the new ``[1, heads, tokens, head size]`` under their sessions."""
        pairs = zip(self._apart(key_states), self._apart(value_states), strict=True)
        self.stored = [
            part.cache.update(keys, values, layer_idx)
            for part, (keys, values) in zip(self.parts, pairs, strict=True)
        ]
        return key_states, value_states

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        masks: Sequence[Any],
        original: str,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Attention session by session; ``[1, tokens, heads, head size]``."""
        function = _own_attention(type(module).__module__, original)
        outputs = []
        for own, (keys, values), mask in zip(self._apart(query), self.stored, masks, strict=True):
            output = function(module, own, keys, values, mask, **options)[0]
            outputs.append(output.reshape(1, -1, *output.shape[2:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def _apart(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """``[1, heads, tokens, size]`` as one ``[rows, heads, length, size]`` per part."""
        begin = 0
        for part in self.parts:
            own = states.narrow(2, begin, part.tokens)
            begin += part.tokens
            if part.rows > 1:
                own = own[0].unflatten(1, (part.rows, part.length)).transpose(0, 1)
            yield own


@functools.cache
def _own_attention(modeling: str, name: str) -> Callable[..., tuple[torch.Tensor, Any]]:
    """What the modules of a modeling file would have called."""
    file: Any = sys.modules[modeling]
    interface = getattr(file, "ALL_ATTENTION_FUNCTIONS", None) or AttentionInterface()
    # Eager attention is no member of the interface: every file brings its own.
    eager: Any = getattr(file, "eager_attention_forward", None)
    return interface.get_interface(name, eager)


@dataclass(slots=True, eq=False)
class _Masks:
    """One mask (or None) per session of a call."""

    each: list[Any]


@dataclass(slots=True, eq=False)
class _Call:
    """A call of the blocks for several sessions.

    Attributes:
        original: how the model attends by itself.
    """

    cache: BatchCache
    original: str


# Functions that transformers finds by name get no argument that says whose tokens they see. Each
# server has one torch thread, so they find it here (a context variable is the thread's own).
_running: ContextVar[_Call | None] = ContextVar("running", default=None)


@contextmanager
def attending(
    configs: Iterable[PreTrainedConfig], cache: BatchCache, original: str
) -> Iterator[None]:
    """Let the decoder whose configs these are attend as the sessions of a cache.

    Args:
        original: how the model attends by itself.
    """
    before = [(config, config._attn_implementation) for config in configs]
    # Not through the property, which goes through all sub-configs.
    for config, _ in before:
        config._attn_implementation_internal = NAME
    token = _running.set(_Call(cache, original))
    try:
        yield
    finally:
        _running.reset(token)
        for config, name in before:
            config._attn_implementation_internal = name


def _mask(**options: Any) -> _Masks:
    """Each session's mask, by the model's own mask function."""
    call = _present()
    make = AttentionMaskInterface()[call.original]
    each = []
    for part in call.cache.parts:
        padding = None if part.padding is None else part.padding.bool()
        own = {"kv_length": part.past + part.length, "q_offset": part.past, "kv_offset": 0}
        shape = {"batch_size": part.rows, "q_length": part.length}
        each.append(make(**{**options, **own, **shape, "attention_mask": padding}))
    return _Masks(each)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    _key: torch.Tensor,
    _value: torch.Tensor,
    attention_mask: _Masks,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    call = _present()
    return call.cache.attend(module, query, attention_mask.each, call.original, options), None


def _present() -> _Call:
    call = _running.get()
    if call is None:
        raise RuntimeError(f"{NAME} was called outside of a batch")
    return call


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
