"""The model under study, whatever was handed in, and hooks on its blocks.

A `Subject` is the Hugging Face model of a `Swarm`, or a model itself: remote or local, plain or
wrapped by PEFT. Its blocks are found as the servers find them, so nothing here knows an
architecture.

Tokens are counted from the end of the states: PEFT's prompt tuning puts its own in front.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from swarm_notebook.checkpoint.anatomy import find_trunk
from swarm_notebook.checkpoint.states import output_state, with_output_state
from swarm_notebook.model.home import Blocks, which
from swarm_notebook.model.inversion import at_rest
from swarm_notebook.swarm import Swarm
from swarm_notebook.writing.prompts import ids_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Target: TypeAlias = "Swarm | nn.Module"
Text: TypeAlias = "str | Sequence[int] | torch.Tensor"
Edit: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A model, its blocks, and the tokenizer to read texts with."""

    model: Any
    blocks: nn.ModuleList
    tokenizer: PreTrainedTokenizerBase | None
    swarm: Swarm | None

    @classmethod
    def of(cls, target: Target, tokenizer: PreTrainedTokenizerBase | None = None) -> Subject:
        swarm = target if isinstance(target, Swarm) else None
        model: Any = target.model if isinstance(target, Swarm) else target
        if tokenizer is None and swarm is not None:
            tokenizer = swarm.tokenizer
        return cls(model, find_trunk(model).layers, tokenizer, swarm)

    def twin(self) -> Subject:
        """Another view on the same weights, with hooks and a mode (train or eval) of its own: for
        use in another thread, where the notebook's cells must not notice it.
        """
        weights = itertools.chain(self.model.parameters(), self.model.buffers())
        model = copy.deepcopy(self.model, {id(weight): weight for weight in weights})
        return replace(self, model=model, blocks=find_trunk(model).layers)

    @property
    def name(self) -> str:
        return self.swarm.name if self.swarm else str(self.model.config._name_or_path)

    @property
    def precision(self) -> str:
        """What the blocks compute in, as their servers announce it; else the model's dtype."""
        rows = self.swarm.status().servers if self.swarm else ()
        announced = {row.precision for row in rows if row.precision}
        return "+".join(sorted(announced)) or str(self.model.dtype).removeprefix("torch.")

    def chosen(self, blocks: Blocks | None) -> list[int]:
        """Block numbers in order, without doubles; None is all, negative ones count from the end.

        Raises:
            BlocksOutOfRange: the model does not have a block.
            TypeError: it is no block, slice, range or list of blocks.
        """
        total = len(self.blocks)
        return list(range(total)) if blocks is None else which(blocks, total)

    def attention(self, block: int) -> nn.Module | None:
        """The module of a block that attends: the one inside of it that keeps its layer's place in
        the cache (``layer_idx``). None if there is not exactly one.
        """
        _whole, *inside = self.blocks[block].modules()
        found = [one for one in inside if "layer_idx" in vars(one)]
        return found[0] if len(found) == 1 else None

    def ids(self, text: Text) -> torch.Tensor:
        """The token ids of one text, ``[tokens]``; ids pass through.

        Raises:
            ValueError: there is no tokenizer for a text, or there are no tokens.
        """
        return ids_of(text, self.tokenizer, self.name)

    def words(self, ids: Iterable[int]) -> list[str]:
        """What each token stands for, alone."""
        if self.tokenizer is None:
            return [str(int(token)) for token in ids]
        return [str(self.tokenizer.decode([int(token)])) for token in ids]

    def at_rest(self) -> AbstractContextManager[Any]:
        """The model without dropout and without gradients; as it was afterwards."""
        return at_rest(self.model)

    @contextmanager
    def reading(self, blocks: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Collects the states of blocks as the model runs."""
        states: dict[int, torch.Tensor] = {}

        def keep(block: int) -> Edit:
            def note(state: torch.Tensor) -> torch.Tensor:
                states[block] = state.detach()
                return state

            return note

        with ExitStack() as hooks:
            for block in blocks:
                hooks.enter_context(self.editing(block, keep(block)))
            yield states

    @contextmanager
    def editing(self, block: int, edit: Edit) -> Iterator[None]:
        """Passes the state of one block through ``edit``; the same tensor returned is a reading."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            before = output_state(output)
            after = edit(before)
            return None if after is before else with_output_state(output, after)

        with self.blocks[block].register_forward_hook(hook):
            yield
