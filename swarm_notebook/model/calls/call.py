"""One run of the model's decoder: what was asked of it, and how far it has come."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import nn

from swarm_notebook.client.adapters import Adapter
from swarm_notebook.client.request import Outputs
from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.layout import Layout
from swarm_notebook.model.blocks.same import SameTensor
from swarm_notebook.model.calls.autograd import Segment
from swarm_notebook.model.generation.cache import RemoteCache


@dataclass
class Call:
    """One run of the model's decoder, from its first block to its last.

    Attributes:
        place: how many of the calls that the layout plans have come.
        end: the block before which the present request ended.
        begun: whether the session knows of this pass.
        blank: the latest block handed out a blank.
        inside: modules inside of remote blocks whose outputs are wanted, by block.
        recorded: those of them that transformers records.
        last: the largest position of the call, plus one.
        asked: how often the rotary modules had been asked before.
        unmasked: the decoder gave its first block no mask; None before that.
        embeddings: rotary embeddings that blocks were given and servers have, too.
        edited: blocks whose input a hook decided in the pass before.
        kept: how many of the last positions of the last block's output are needed; None for all.
        packs: transformers would take positions that begin again for sequences packed in one row.
        hooked: blocks whose outputs hooks of the user look at; ``states`` may have more.
        preceded: code of the user's runs before the first block, and may hook others.
        outer: the call that was under way, if one of its hooks has called the model.
    """

    cache: RemoteCache | None
    layout: Layout
    rows: int
    new: int
    position: int
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    adapter: Adapter | None
    seed: int | None
    states: set[int]
    inside: dict[int, list[tuple[str, nn.Module]]]
    recorded: set[tuple[int, str]]
    last: int
    kept: int | None
    edited: frozenset[int]
    packs: bool
    asked: int
    hooked: set[int]
    outer: Call | None
    preceded: bool
    unmasked: bool | None = None
    embeddings: list[Any] = field(default_factory=list)
    outputs: Outputs = field(default_factory=lambda: Outputs({}, {}))
    place: int = 0
    end: int = 0
    begun: bool = False
    blank: bool = False
    whole: bool = False
    shortened: bool = False
    # The block to come, and the input that it gets if nobody changes anything.
    following: int = 0
    expected: SameTensor | None = None
    # Where gradients flow: the open piece of the segment, and its input.
    segment: Segment | None = None
    piece: int = 0
    piece_input: torch.Tensor | None = None

    def continues(self, index: int, hidden: torch.Tensor) -> bool:
        """Whether block ``index`` is called with what was handed out for it."""
        expected = self.expected
        known = index == self.following and index < self.end
        return known and expected is not None and expected.matches(hidden)

    def look_at(self, boundaries: set[int], blocks: int) -> None:
        """Hand out true outputs of blocks, of all ``blocks``, which somebody looks at by now."""
        if boundaries <= self.hooked:
            return
        self.states, self.hooked = self.states | boundaries, self.hooked | boundaries
        self.whole = False
        if blocks - 1 in boundaries:
            self.kept = None

    def arrive(self, index: int) -> int | None:
        """Count a call of block ``index``; its place in the layout, if it was planned."""
        place = self.layout.find(index, self.place)
        if place is not None:
            self.place = place + 1
        return place

    def end_before_edits(self, index: int) -> None:
        """Let the request from block ``index`` on end where a hook changes the state, most likely.

        What lies behind would be computed for nothing, and again with the changed state.
        """
        ends = (block for block in self.edited if block > index and block - 1 in self.states)
        self.end = min([self.end, *ends])

    def refuse_detours(self, index: int, before: int, place: int | None) -> None:
        """With a cache, all blocks have to be called as they are listed."""
        if place is None:
            raise Unsupported(
                f"block {index} is called again or out of order, but has one place in a cache; "
                "pass use_cache=False"
            )
        passed = self.layout.order[before:place]
        skipped = [block for block in passed if block not in self.layout.home]
        if skipped:
            raise Unsupported(
                f"block {skipped[0]} was skipped, so it has no keys and values for these tokens; "
                "pass use_cache=False to run without some blocks, or take them out of the list"
            )


def is_running(forward: CodeType, module: nn.Module) -> bool:
    """Whether a module's ``forward`` is under way in this thread."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is forward and frame.f_locals.get("self") is module:
            return True
    return False
