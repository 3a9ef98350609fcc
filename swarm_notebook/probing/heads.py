"""Patching single attention heads: which of them carry what makes the difference.

(Wang et al., 2023.) As `patching`, but what is restored in the corrupted run is the output of one
head of one block: its part of what the attention's output projection reads. That lies inside of
the block, so the block must be at home (``swarm.own(block)``), or the model local.

All heads of one block are the rows of one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from swarm_notebook.model.home import Blocks
from swarm_notebook.probing.patching import (
    Metric,
    Restored,
    places_of,
    run_metric,
    scores_of_both,
)
from swarm_notebook.probing.subject import Edit, Subject, Target, Text
from swarm_notebook.progress import Waiting
from swarm_notebook.report.formatting import model_title

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class HeadPatching(Restored):
    """What restoring the clean output of each head does to the metric; scores ``[blocks, heads]``.

    Attributes:
        blocks: what was patched.
    """

    blocks: list[int]

    _patch: ClassVar[str] = "head"

    @property
    def _lines(self) -> list[int]:
        return self.blocks

    @property
    def _names(self) -> list[str]:
        return [f"h{number}" for number in range(self.scores.shape[1])]

    def _hint(self, line: int | str, at: int) -> str:
        return f"block {line}, head {at}: "

    def _place(self, row: int, at: int) -> dict[str, Any]:
        return {"block": self.blocks[row], "head": at}


def patch_heads(
    target: Target,
    clean: Text,
    corrupted: Text,
    metric: Metric,
    *,
    blocks: Blocks | None = None,
    positions: Iterable[int] | None = None,
    projection: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> HeadPatching:
    """Restore the clean output of each head of the corrupted run.

    Args:
        target, clean, corrupted, metric, tokenizer: as for `patch`.
        blocks: a block, a list, a range or a slice, at home; None is all.
        positions: where it is restored; None is all from the first token that differs.
        projection: the name, in a block, of the layer that reads what the heads give, such as
            ``"self_attn.o_proj"``. None takes the last one with a matrix that runs in the module
            that attends.

    Raises:
        Unsupported: a block runs on a server; the message says how to bring it home.
        ValueError: as `patch`; or a block has no such layer, or none that can be found.
    """
    subject = Subject.of(target, tokenizer)
    chosen, good, bad = subject.chosen(blocks), subject.ids(clean), subject.ids(corrupted)
    places = places_of(positions, subject, good, bad)
    able = {block: _layers(subject, block, projection) for block in chosen}
    layers: dict[int, nn.Module] = {}
    heads = subject.model.config.get_text_config().num_attention_heads
    states: dict[int, torch.Tensor] = {}
    scores: list[list[float]] = []

    def keep(block: int, layer: nn.Module) -> Edit:
        def note(state: torch.Tensor) -> torch.Tensor:
            states[block], layers[block] = state[0].detach(), layer  # the last to run stays
            return state

        return note

    with subject.at_rest():
        with ExitStack() as hooks:
            for block, found in able.items():
                for layer in found:
                    hooks.enter_context(_editing_input(layer, keep(block, layer)))
            # The clean run is the last of the two, and so the one whose states are kept.
            both = scores_of_both(subject, good, bad, metric)
        rows, at = bad.expand(heads, -1), [place - len(bad) for place in places]
        with Waiting("Patching", total=len(chosen), unit="blocks", count=lambda: len(scores)):
            for block, layer in layers.items():
                with _editing_input(layer, _restoring(states[block], at)):
                    scores.append(run_metric(subject, rows, metric))
    return HeadPatching(model_title(subject.name), torch.tensor(scores), *both, chosen)


def _layers(subject: Subject, block: int, name: str | None) -> list[nn.Module]:
    """The layer of that name; or those of the block's attention, the last of which is meant."""
    modules = dict(subject.blocks[block].named_modules())
    if name is None:
        attention = subject.attention(block)
        parts = list(attention.children()) if attention else []
        found = [one for one in parts if any(weight.dim() == 2 for weight in one.parameters())]
    else:
        found = [modules[name]] if name in modules else []
    if not found:
        linear = ", ".join(key for key, one in modules.items() if isinstance(one, nn.Linear))
        wrong = f"has no {name!r}" if name else "has no module that is known to attend"
        raise ValueError(f"projection: block {block} {wrong}; its linear layers: {linear}")
    return found


@contextmanager
def _editing_input(module: nn.Module, edit: Edit) -> Iterator[None]:
    """Passes what a module reads through ``edit``; the same tensor returned is a reading."""

    def hook(_module: nn.Module, args: Any) -> Any:
        after = edit(args[0])
        return None if after is args[0] else (after, *args[1:])

    with module.register_forward_pre_hook(hook):
        yield


def _restoring(state: torch.Tensor, places: list[int]) -> Edit:
    """Row by row the clean output of another head, at places that count from the end."""

    def edit(corrupted: torch.Tensor) -> torch.Tensor:
        mended = corrupted.clone()
        width = state.shape[-1] // len(corrupted)
        for row in range(len(corrupted)):
            part = slice(row * width, (row + 1) * width)
            mended[row, places, part] = state[places, part]
        return mended

    return edit
