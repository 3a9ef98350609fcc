"""What a recording of a joined call leaves open, and asks anew whenever it is replayed.

Everything in a joined call but attention and adapters has the shape ``[1, tokens, …]`` whoever the
sessions are (`attention`), so it can be recorded and replayed for other sessions. A recording has
one operator, `swarm_notebook::attend`, for each call of attention, and, if it is for sessions with
adapters, one, `swarm_notebook::adapt`, after each module that an adapter may tune. A `Script` lists
what each of them stands for; masks, attention and adapters are done anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from swarm_notebook.server.attention import JoinedCache, masks_of
from swarm_notebook.server.joined_call import JoinedCall, Masks, present
from swarm_notebook.server.mixing import Site, fits


class Unrecordable(Exception):
    """Something in a call depends on more than its hidden states and positions."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A call of attention: what it was asked besides its tensors.

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
    """What a recording must ask anew: attention, masks (as options), adapters.

    Attributes:
        block: while the recording is made, the block whose keys and values are at hand.
    """

    calls: list[_Asked] = field(default_factory=list)
    masks: list[dict[str, Any]] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    block: int | None = None

    def attention(
        self,
        module: nn.Module,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        masks: Masks,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Record a call of attention for queries, keys and values."""
        if self.block is None:
            raise Unrecordable(f"{type(module).__name__} attends to keys of another block")
        constant = _constant(module, options)
        self.calls.append(_Asked(module, self.block, masks.number, constant))
        self.block = None
        return torch.ops.swarm_notebook.attend(*states, len(self.calls) - 1)

    def outline(self) -> Any:
        """What scripts of blocks with the same operations have in common."""
        masks = [asked.mask for asked in self.calls]
        return masks, len(self.masks), [name for _, name in self.sites]

    def open(self, site: Site, tokens: int) -> Callable[..., torch.Tensor | None]:
        """A hook of a module that records it as one that adapters may tune."""

        def hook(_module: nn.Module, inputs: tuple, output: Any) -> torch.Tensor | None:
            if not fits(inputs, output, tokens):
                return None
            self.sites.append(site)
            return torch.ops.swarm_notebook.adapt(output, inputs[0], len(self.sites) - 1)

        return hook


class RecordingCache(JoinedCache):
    """The cache of a call that is recorded: keys and values are filed by `attend`."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _script_of(present()).block = layer_idx
        return key_states, value_states


def masks_for(call: JoinedCall) -> list[Masks]:
    """The masks that a call's script wants, each for the call's sessions."""
    script = _script_of(call)
    used = {asked.mask for asked in script.calls}
    call.masks = []
    for number, options in enumerate(script.masks):
        if number in used:
            masks_of(call, options)
        else:
            call.masks.append(Masks([], number))
    return call.masks


def _constant(module: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options of attention that are the same in every call; others may not matter."""
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    constant = {name: value for name, value in options.items() if name != "position_ids"}
    for name, value in constant.items():
        if isinstance(value, torch.Tensor) and id(value) not in own:
            raise Unrecordable(f"{type(module).__name__} computes {name} for its attention anew")
    return constant


def _script_of(call: JoinedCall) -> Script:
    if call.script is None:
        raise RuntimeError("this call was never recorded")
    return call.script


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, site: int) -> torch.Tensor:
    """One call of attention of a recording, for the sessions of the call that is running."""
    call = present()
    asked = _script_of(call).calls[site]
    JoinedCache.update(call.cache, key, value, asked.block)
    masks = call.masks[asked.mask].each
    return call.cache.attend(asked.module, query, masks, call.original, asked.options)


def _adapt(output: torch.Tensor, x: torch.Tensor, site: int) -> torch.Tensor:
    """What a module of a recording gives, with what adapters of the sessions add to it."""
    call = present()
    call.cache.mixture.apply(_script_of(call).sites[site], x, output)
    return output


_LIBRARY = torch.library.Library("swarm_notebook", "DEF")
_LIBRARY.define("attend(Tensor query, Tensor key, Tensor value, int site) -> Tensor")
_LIBRARY.define("adapt(Tensor(a!) output, Tensor x, int site) -> Tensor(a!)")
_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("adapt", _adapt, "CompositeExplicitAutograd")
