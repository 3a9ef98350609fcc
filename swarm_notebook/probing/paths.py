"""Path patching: which block reads what another one has written.

(Goldowsky-Dill et al., 2023; Wang et al., 2023.) A block writes into the residual stream: its
output less its input. In the corrupted run, one *receiver* gets its input with what one *sender*
has written in the clean run; all other blocks get theirs as it was. What the receiver makes of it
goes on to the blocks behind it. The metric then says what the direct path from sender to receiver
carries: 0 as corrupted, 1 as clean. The last receiver is what follows the blocks: the final norm
and the head.

With ``d`` what the sender wrote more in the clean run, ``d`` is added to the receiver's input and
taken off its output: the stream passes the receiver as in the corrupted run. All senders of one
receiver are the rows of one batch, so a remote model is asked three times per receiver.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

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

LOGITS = "logits"


@dataclass(frozen=True, repr=False)
class PathPatching(Restored):
    """What the direct path from each sender to each receiver carries.

    Scores are ``[receivers, senders]``; NaN where the sender does not stand before the receiver.

    Attributes:
        senders: blocks whose writing was taken from the clean run.
        receivers: blocks that got it, and at the end ``"logits"``.
    """

    senders: list[int]
    receivers: list[int | str]

    _patch: ClassVar[str] = "direct path"
    _corner: ClassVar[str] = "receiver"
    _absent: ClassVar[str] = "no path, the sender is not before the receiver"

    @property
    def _lines(self) -> list[int | str]:
        return self.receivers

    @property
    def _names(self) -> list[str]:
        return [f"from {block}" for block in self.senders]

    def _hint(self, line: int | str, at: int) -> str:
        return f"{self.senders[at]} to {line}: "

    def _place(self, row: int, at: int) -> dict[str, Any]:
        return {"sender": self.senders[at], "receiver": self.receivers[row]}


def path_patch(
    target: Target,
    clean: Text,
    corrupted: Text,
    metric: Metric,
    *,
    senders: Blocks | None = None,
    receivers: Blocks | None = None,
    positions: Iterable[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PathPatching:
    """Let each receiver read what each sender before it has written in the clean run.

    Args:
        target, clean, corrupted, metric, tokenizer: as for `patch`.
        senders: a block, a list, a range or a slice; None is all.
        receivers: the same; the logits are always among them.
        positions: where the receiver reads it; None is all from the first token that differs.

    Raises:
        ValueError: as `patch`.
    """
    subject = Subject.of(target, tokenizer)
    sending, reading = subject.chosen(senders), subject.chosen(receivers)
    good, bad = subject.ids(clean), subject.ids(corrupted)
    places = places_of(positions, subject, good, bad)
    last = len(subject.blocks) - 1
    scores: list[list[float]] = []
    with subject.at_rest():
        both = scores_of_both(subject, good, bad, metric)
        written, before = _written(subject, good, sending), _written(subject, bad, sending)
        ends: list[int | str] = [*reading, LOGITS]
        count = len(ends)
        with Waiting("Patching", total=count, unit="receivers", count=lambda: len(scores)):
            for end in ends:
                number = last + 1 if isinstance(end, str) else end
                able = [block for block in sending if block < number]
                row = dict.fromkeys(sending, math.nan)
                if able:
                    more = torch.stack([written[block] - before[block] for block in able])
                    at = [place - len(bad) for place in places]
                    with ExitStack() as edits:
                        edits.enter_context(subject.editing(number - 1, _adding(more, at, 1)))
                        if number <= last:
                            edits.enter_context(subject.editing(number, _adding(more, at, -1)))
                        rows = bad.expand(len(able), -1)
                        row |= zip(able, run_metric(subject, rows, metric), strict=True)
                scores.append(list(row.values()))
    return PathPatching(model_title(subject.name), torch.tensor(scores), *both, sending, ends)


def _written(subject: Subject, ids: torch.Tensor, blocks: list[int]) -> dict[int, torch.Tensor]:
    """What blocks write into the residual stream, ``[tokens, hidden]`` each."""
    needed = sorted({near for block in blocks for near in (block - 1, block) if near >= 0})
    with subject.reading(needed) as states:
        found = subject.model(
            input_ids=ids[None].to(subject.model.device),
            use_cache=False,
            output_hidden_states=True,
        )
    states[-1] = found.hidden_states[0]  # what enters the first block
    return {block: (states[block] - states[block - 1])[0, -len(ids) :] for block in blocks}


def _adding(more: torch.Tensor, places: list[int], sign: int) -> Edit:
    """Adds ``more``, ``[rows, tokens, hidden]``, at some places, which count from the end."""

    def edit(state: torch.Tensor) -> torch.Tensor:
        changed = state.clone()
        changed[:, places] += sign * more[:, places].to(state)
        return changed

    return edit
