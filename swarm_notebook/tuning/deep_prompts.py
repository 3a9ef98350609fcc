"""Deep prompt tuning: trainable vectors added to the first positions of every block's input.

The variant of P-tuning v2 (Liu et al., 2022, https://arxiv.org/abs/2110.07602) that Petals' servers
know: where prefix tuning gives each attention layer extra keys and values, which would have to
live in the servers' caches, this adds to the hidden states of the prompt's first positions. The
vectors travel with the request, so they cost no extra round trip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from swarm_notebook.errors import Unsupported


class DeepPrompts(nn.Module):
    """Deep prompts of a remote model; active from their making until `remove`.

    Put ``length`` placeholder tokens in front of each text (any token: its state is what the
    prompts are added to) and train ``parameters()`` as those of any module.

    Args:
        model: a model of `swarm_notebook.connect`.
        length: how many positions get a vector.
        std: standard deviation of the initial values.

    Attributes:
        prompts: ``[blocks, length, hidden]``, in the model's dtype.

    Raises:
        Unsupported: the model is not a remote one, or has deep prompts already.
    """

    prompts: nn.Parameter

    def __init__(self, model: nn.Module, length: int, *, std: float = 0.02):
        super().__init__()
        self._runner: Any = getattr(model, "_runner", None)
        if self._runner is None:
            raise Unsupported(
                f"model: {type(model).__name__} is not a remote model of swarm_notebook.connect"
            )
        if self._runner.deep_prompts is not None:
            raise Unsupported("the model has deep prompts already; call remove() on them first")
        if length < 1:
            raise ValueError(f"length: {length} positions; give at least 1")
        remote: Any = model
        shape = (len(self._runner.blocks), length, remote.config.get_text_config().hidden_size)
        drawn = torch.randn(shape, dtype=remote.dtype) * std  # the same on all devices
        self.prompts = nn.Parameter(drawn.to(remote.device))
        self._runner.deep_prompts = self.prompts

    def forward(self) -> torch.Tensor:
        """The prompts themselves: they act inside of the model's own forward."""
        return self.prompts

    def remove(self) -> None:
        """Let the model run without prompts again."""
        if self._runner.deep_prompts is self.prompts:
            self._runner.deep_prompts = None

    def save(self, path: str | Path) -> None:
        """Write the prompts to a safetensors file."""
        save_file({"prompts": self.prompts.detach().cpu().contiguous()}, path)

    def load(self, path: str | Path) -> None:
        """Read the prompts that `save` wrote; ValueError if they are of another shape."""
        loaded = load_file(path)["prompts"]
        if loaded.shape != self.prompts.shape:
            raise ValueError(
                f"{path} holds prompts of shape {list(loaded.shape)}, the model needs "
                f"{list(self.prompts.shape)}"
            )
        with torch.no_grad():
            self.prompts.copy_(loaded)
