"""One call of a decoder for the tokens of many sessions: every weight is read once for all.

The tokens of all sessions are laid end to end as *one row* ``[1, tokens, hidden]``. Everything in a
block works token by token (projections, norms, rotations by position, experts), except for
attention, and there transformers asks functions that are registered by name. Ours, registered as
`NAME`, take the row apart: each session's keys and values are filed in its own cache, and its
queries go, with its own mask, to the very function that the model would have called for that
session alone. So windows, soft caps, sinks and grouped heads are the model's own code, and nothing
here knows an architecture.

Masks are made once per call and kind of block: the mask function calls the model's own once per
session and returns the list, as a `_Masks` object, which the decoder hands on to attention unseen.

Whether an architecture plays along (calls the interface, hands the mask on, mixes tokens nowhere
else) is not known by name but tried: see `joining`.

Everything but attention has the shape ``[1, tokens, …]`` whoever the sessions are. So a call can be
recorded and replayed for other sessions (`replayed`, see `graphs`): the recording has one operator,
`swarm_notebook::attend`, for each call of attention, and a list of what each was asked (`Script`);
attention itself and the masks are done anew. `JoinedCache.attend` is the place for a kernel that
reads all sessions at once, where a call per session and block costs more than on a CPU.

All of this runs in the one torch thread; `_running` names the sessions of the call that is running.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig

from swarm_notebook.server.cache import SessionCache

NAME = "swarm_notebook_joined"


@dataclass(slots=True, eq=False)
class Part:
    """One session's tokens in a joined call.

    Attributes:
        cache: where its keys and values are filed.
        rows, length: its new tokens.
        padding: ``[rows, cached + new positions]``, 0 for padding; None if there is none.
        past: how many positions precede the new ones, in the blocks of the call.
    """

    cache: SessionCache
    rows: int
    length: int
    padding: torch.Tensor | None = None
    past: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class JoinedCache(Cache):
    """The caches of several sessions, as one to the decoder.

    To the decoder it is empty: positions and masks come per session from elsewhere.
    """

    def __init__(self, parts: Sequence[Part]):
        super().__init__(layers=[])
        self.parts = parts
        # Keys and values of every part in the block that is running.
        self.stored: list[tuple[torch.Tensor, torch.Tensor]] = []

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
        self, module: nn.Module, query: torch.Tensor, masks: _Masks, options: dict[str, Any]
    ) -> torch.Tensor:
        """Attention session by session; ``[1, tokens, heads, head size]``."""
        function = _own_attention(type(module).__module__, masks.original)
        outputs = []
        for own, (keys, values), mask in zip(
            self._apart(query), self.stored, masks.each, strict=True
        ):
            output = function(module, own, keys, values, mask, **options)[0]
            outputs.append(output.reshape(1, -1, *output.shape[2:]))
        unused = query.shape[2] - sum(part.tokens for part in self.parts)
        if unused:
            outputs.append(outputs[0].new_zeros(1, unused, *outputs[0].shape[2:]))
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


@dataclass(slots=True, eq=False)
class _Masks:
    """One mask (or None) per part, and how the model attends by itself.

    Attributes:
        number: which of the masks of the call this is.
    """

    each: list[Any]
    cache: JoinedCache
    original: str
    number: int = 0


class Unrecordable(Exception):
    """Something in a call depends on more than its hidden states and positions."""


@dataclass(slots=True, eq=False)
class _Site:
    """A call of attention in a recording: what it was asked besides its tensors.

    Attributes:
        block: under which its keys and values are filed.
        mask: which of the recording's masks it was given.
    """

    module: nn.Module
    block: int
    mask: int
    options: dict[str, Any]


@dataclass(slots=True, eq=False)
class Script:
    """What a recording must ask anew: its calls of attention and, as options, its masks."""

    sites: list[_Site] = field(default_factory=list)
    masks: list[dict[str, Any]] = field(default_factory=list)


@functools.cache
def _own_attention(modeling: str, name: str) -> Callable[..., tuple[torch.Tensor, Any]]:
    """What the modules of a modeling file would have called."""
    file: Any = sys.modules[modeling]
    interface = getattr(file, "ALL_ATTENTION_FUNCTIONS", None) or AttentionInterface()
    # Eager attention is no member of the interface: every file brings its own.
    eager: Any = getattr(file, "eager_attention_forward", None)
    return interface.get_interface(name, eager)


@dataclass(slots=True, eq=False)
class _Call:
    """A joined call: its sessions, the model's own attention, and the masks that it has asked for.

    Attributes:
        script: of the recording that is made or replayed.
        block: while a recording is made, the block whose keys and values are at hand.
    """

    cache: JoinedCache
    original: str
    script: Script | None = None
    masks: list[_Masks] = field(default_factory=list)
    block: int | None = None


# The call that is running in the torch thread.
_running: _Call | None = None


@contextmanager
def joined(
    configs: Iterable[PreTrainedConfig], cache: JoinedCache, script: Script | None = None
) -> Iterator[str]:
    """Let the decoder whose configs these are attend as `cache`'s sessions; how it does by itself.

    Args:
        script: gets what a recording of this call must ask anew.
    """
    before = [(config, config._attn_implementation) for config in configs]
    # Not through the property, which goes through all sub-configs.
    for config, _ in before:
        config._attn_implementation_internal = NAME
    original = str(before[0][1])
    try:
        with _run(_Call(cache, original, script)):
            yield original
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


@contextmanager
def replayed(script: Script, cache: JoinedCache, original: str) -> Iterator[None]:
    """Let a recording attend as `cache`'s sessions, by the model's attention ``original``."""
    call = _Call(cache, original, script)
    with _run(call):
        call.masks = [_masks(call, options) for options in script.masks]
        yield


@contextmanager
def _run(call: _Call) -> Iterator[None]:
    global _running
    _running = call
    try:
        yield
    finally:
        _running = None


def _present() -> _Call:
    if _running is None:
        raise RuntimeError(f"attention {NAME!r} is for joined calls only")
    return _running


class RecordingCache(JoinedCache):
    """The cache of a call that is recorded: keys and values are filed by `attend`."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _present().block = layer_idx
        return key_states, value_states


def _mask(**options: Any) -> _Masks:
    """Each session's mask, by the model's own mask function."""
    call = _present()
    masks = _masks(call, options)
    masks.number = len(call.masks)
    call.masks.append(masks)
    if call.script is not None:
        call.script.masks.append(options)
    return masks


def _masks(call: _Call, options: dict[str, Any]) -> _Masks:
    make = AttentionMaskInterface()[call.original]
    each = []
    for part in call.cache.parts:
        padding = None if part.padding is None else part.padding.bool()
        own = {"kv_length": part.past + part.length, "q_offset": part.past, "kv_offset": 0}
        shape = {"batch_size": part.rows, "q_length": part.length}
        each.append(make(**{**options, **own, **shape, "attention_mask": padding}))
    return _Masks(each, call.cache, call.original)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: _Masks,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    call = _present()
    if call.script is None:
        return call.cache.attend(module, query, attention_mask, options), None
    if call.block is None:
        raise Unrecordable(f"{type(module).__name__} attends to keys of another block")
    site = _Site(module, call.block, attention_mask.number, _constant(module, options))
    call.block = None
    call.script.sites.append(site)
    number = len(call.script.sites) - 1
    return torch.ops.swarm_notebook.attend(query, key, value, number), None


def _constant(module: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options of attention that are the same in every call; others may not matter."""
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    constant = {name: value for name, value in options.items() if name != "position_ids"}
    for name, value in constant.items():
        if isinstance(value, torch.Tensor) and id(value) not in own:
            raise Unrecordable(f"{type(module).__name__} computes {name} for its attention anew")
    return constant


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, site: int) -> torch.Tensor:
    """One call of attention of a recording, for the sessions of the call that is running."""
    call = _present()
    if call.script is None:
        raise RuntimeError("a recording runs outside of `replayed`")
    asked = call.script.sites[site]
    JoinedCache.update(call.cache, key, value, asked.block)
    return call.cache.attend(asked.module, query, call.masks[asked.mask], asked.options)


_LIBRARY = torch.library.Library("swarm_notebook", "DEF")
_LIBRARY.define("attend(Tensor query, Tensor key, Tensor value, int site) -> Tensor")
_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")

AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
