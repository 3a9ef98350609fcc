"""What a backward pass gives: of the whole span at once, or gathered block by block."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from swarm_notebook.server.engine.requests import Backward


@dataclass
class SpanGradients:
    """Of the input, of the prompts if there are any, of the boundaries asked for, of ``weights``.

    Attributes:
        weights: the names of the adapter's parameters whose gradients come last; None without one.
    """

    tensors: list[torch.Tensor]
    weights: list[str] | None


@dataclass
class Gathered:
    """Gradients of a request that come block by block, from the last one on.

    Attributes:
        grad: that of the output of the block which is next.
    """

    wanted: Backward
    grad: torch.Tensor = field(init=False)
    _prompts: list[torch.Tensor] = field(default_factory=list)
    _states: dict[int, torch.Tensor] = field(default_factory=dict)
    _weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.grad = self.wanted.grad

    def add(self, found: SpanGradients, block: int) -> None:
        """What one block has given: of its input, its prompts, its weights."""
        self.grad, *rest = found.tensors
        if self.wanted.prompts is not None:
            self._prompts.append(rest.pop(0))
        self._weights.update(zip(found.weights or (), rest, strict=True))
        if block - 1 in self.wanted.states:
            self._states[block - 1] = self.grad

    def result(self) -> SpanGradients:
        """As one for all blocks."""
        prompts = [torch.cat(self._prompts[::-1])] if self._prompts else []
        states = [self._states[block] for block in self.wanted.states]
        names = None if self.wanted.adapter is None else list(self._weights)
        gradients = [self.grad, *prompts, *states, *self._weights.values()]
        return SpanGradients(gradients, names)
