"""Of how many positions a call needs the last block's output.

``generate`` asks for the logits of the last position only (``logits_to_keep=1``), and so does who
scores a few tokens. Then the other positions of the last block's output need not travel. In their
place the decoder gets NaN: what looks at them all the same shows it.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.hooks import seen_by_others

_OPTION = "logits_to_keep"


class Kept:
    """Knows what the model's call that is under way in a thread wants logits of."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._trusted = True

    def begin(self, model: nn.Module, options: dict[str, Any]) -> bool:
        """The model is called.

        Returns:
            what `go_on` is to be told afterwards: a hook may have called it in another call.
        """
        outer: bool = getattr(self._local, "shortened", False)
        wanted = options.get(_OPTION)
        # A model without this option computes all logits, whoever asks.
        model_class: Any = type(model)
        known = type(wanted) is int and wanted > 0 and _knows_option(model_class)
        self._local.wanted = (model, wanted) if known else None
        self._local.shortened = False
        return outer

    def go_on(self, outer: bool) -> None:
        """A call has ended; ``outer`` is what its beginning returned."""
        self._local.shortened = outer

    def positions(self, length: int, blocks: Collection[nn.Module]) -> int | None:
        """How many of the last of ``length`` positions are needed; None for all.

        Only the first run of the decoder within a call is one of which this is known.

        Args:
            blocks: those of the decoder.
        """
        asked = getattr(self._local, "wanted", None)
        self._local.wanted = None
        if asked is None or not self._trusted or asked[1] >= length or looked_at(asked[0], blocks):
            return None
        found: int = asked[1]
        return found

    def fill_up(self, state: torch.Tensor, length: int) -> torch.Tensor:
        """The last positions of an output behind NaN, ``[rows, length, hidden]``."""
        rows, known, hidden = state.shape
        if known == length:
            return state
        self._local.shortened = True
        whole = state.new_full((rows, length, hidden), torch.nan)
        whole[:, length - known :] = state
        return whole

    def check(self, output: Any) -> None:
        """Refuse logits that were made of positions which did not come.

        Raises:
            Unsupported: there is a NaN in them.
        """
        if not self._local.shortened:
            return
        logits = output["logits"] if "logits" in output else output[0]
        if torch.isnan(logits).any():
            self._trusted = False
            raise Unsupported(
                f"{_OPTION}: there is NaN in the logits, so what stands between the last block and "
                "the head may look at positions that were not asked for; call the model again: "
                "from now on it gets all"
            )


def looked_at(model: nn.Module, blocks: Collection[nn.Module]) -> bool:
    """Whether somebody may see what lies between the last block and the logits."""
    inside = set(blocks)
    waiting = [model]
    while waiting:
        module = waiting.pop()
        # The model's own hooks see ids and logits; in place of its forward may be anything.
        if "forward" in module.__dict__ or (module is not model and seen_by_others(module)):
            return True
        waiting.extend(child for child in module.children() if child not in inside)
    return False


@functools.cache
def _knows_option(model_class: Any) -> bool:
    return _OPTION in inspect.signature(model_class.forward).parameters
