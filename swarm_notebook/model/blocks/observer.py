"""What of the blocks somebody looks at, and whether they are still what the servers hold.

Both are asked at every call, and looking at every module of a model takes longer than the rest of
a decode step: within one text, all is looked at again only if something about the modules changed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from swarm_notebook.model.blocks import hooks
from swarm_notebook.model.blocks.intact import BlockPlan, refuse_export
from swarm_notebook.model.blocks.layout import Layout


class Observed(NamedTuple):
    """Blocks whose outputs are looked at, and modules inside of blocks, by block."""

    boundaries: set[int]
    inside: dict[int, list[tuple[str, nn.Module]]]


class Observer:
    """Looks at the blocks of one model.

    PEFT changes the modules inside of blocks when it injects adapters: ``injections`` counts them.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self._blocks = blocks
        self._plans = [BlockPlan(block) for block in blocks]
        self._inside: tuple[int, list[tuple[int, str, nn.Module]]] = (-1, [])
        self._by_block: dict[int, list[tuple[int, str, nn.Module]]] = {}
        self._looked: tuple[Any, hooks.ChangeWatch, Observed] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Observer:
        twin = object.__new__(Observer)
        twin._blocks = copy.deepcopy(self._blocks, memo)
        twin._plans = copy.deepcopy(self._plans, memo)
        twin._inside, twin._by_block, twin._looked = (-1, []), {}, None
        return twin

    def observed(self, layout: Layout, injections: int, *, continued: bool) -> Observed:
        """What of the blocks somebody looks at.

        Raises:
            Unsupported: something was exchanged inside of remote blocks.
        """
        key = layout, injections, hooks.hooks_everywhere()
        if continued and self._looked is not None and self._looked[0] == key:
            _, watch, found = self._looked
            if watch.unchanged:
                return found
        # Before all is looked at: what changes meanwhile is seen the next time.
        watch = hooks.ChangeWatch(self._blocks)
        self.check_intact(layout, thorough=not continued)
        boundaries = hooks.observed_boundaries(self._blocks, False)
        modules = self.modules(layout, injections)
        found = Observed(boundaries, hooks.observed_inside(modules, ()))
        if modules and key[-1]:
            warnings.warn(_GLOBAL, stacklevel=2)
        if modules and (mode := hooks.mode_of_others()) is not None:
            warnings.warn(f"{mode}: {_MODE}", stacklevel=2)
        self._looked = key, watch, found
        return found

    def check_intact(self, layout: Layout, *, thorough: bool) -> None:
        """Refuse what was exchanged inside of remote blocks.

        Raises:
            Unsupported: names the module, and the way out.
        """
        refuse_export(layout.order[0] if layout.order else 0)
        for index in sorted(set(layout.order) - layout.home):
            self._plans[index].check(index, self._blocks[index], thorough=thorough)

    def modules(self, layout: Layout, injections: int) -> list[tuple[int, str, nn.Module]]:
        """All modules inside of remote blocks, with their block and dotted name."""
        if self._inside[0] != injections:
            blocks = enumerate(self._blocks)
            remote = {index: block for index, block in blocks if index not in layout.home}
            self._inside = (injections, hooks.modules_inside(remote))
            self._by_block = {}
            for found in self._inside[1]:
                self._by_block.setdefault(found[0], []).append(found)
        return self._inside[1]

    def late(self, index: int, known: Sequence[tuple[str, nn.Module]]) -> list[Any] | None:
        """What somebody has begun to look at in block ``index`` since its model was called.

        Args:
            known: modules inside of it that are observed already.

        Returns:
            all modules inside of it that are observed now; None if there are no more than known.
        """
        found = hooks.observed_inside(self._by_block.get(index, ()), ()).get(index, [])
        more = any(one not in known for one in found)
        return [*known, *(one for one in found if one not in known)] if more else None


_MODE = (
    "a mode of torch sees, counts and changes what is computed here, and nothing of what remote "
    "blocks compute on their servers; bring the blocks home for it: swarm.own(slice(None))"
)
_GLOBAL = (
    "hooks for all modules (torch.nn.modules.module.register_module_…) see remote blocks, but not "
    "the modules inside of them; register a hook on those themselves, or bring the blocks home: "
    "swarm.own(slice(None))"
)
