"""Makes sure that a partial model changes hidden states by its blocks and by nothing else.

Some decoders do more around their blocks than their modules show: Granite multiplies the embeddings
by a constant, CTRL and XGLM add positions that are no module's output. In a chain of servers that
would happen once per server. So a loaded part is tried with its first block: what enters the block
must be what entered the model, and what leaves the model must be what left the block, bit for bit.
Where the entry differs, the model's input is handed to the first block directly. An exit that
differs cannot be mended; such an architecture is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm_notebook.errors import Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swarm_notebook.checkpoint.anatomy import Trunk
from swarm_notebook.checkpoint.states import input_state, with_input_state, with_output_state


def make_transparent(model: PreTrainedModel, trunk: Trunk) -> None:
    """Mend what can be mended so that only blocks change hidden states; else raise Unsupported."""
    entry, exit_ = _try_first_block(model, trunk)
    if not entry:
        _HandOver().install(trunk)
        entry, exit_ = _try_first_block(model, trunk)
    if not (entry and exit_):
        where = "before its first" if exit_ else "after its last"
        raise Unsupported(
            f"{type(model).__name__} changes the hidden states {where} block in a way that cannot "
            "be turned off, so its blocks cannot be served"
        )


@torch.no_grad()
def _try_first_block(model: PreTrainedModel, trunk: Trunk) -> tuple[bool, bool]:
    """Whether hidden states reach the first block, and leave it, unchanged."""
    # Of its own generator: loading a model leaves the caller's random numbers alone.
    noise = torch.randn(2, 1, 2, model.config.hidden_size, generator=torch.Generator())
    given, made = noise.to(model.device, model.dtype)
    received: list[torch.Tensor] = []

    def before(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        received.append(input_state(inputs, named))

    def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return with_output_state(output, made)

    layers = trunk.layers
    trunk.set_layers(nn.ModuleList([layers[0]]))
    try:
        with (
            layers[0].register_forward_pre_hook(before, with_kwargs=True),
            layers[0].register_forward_hook(after),
        ):
            result = model(inputs_embeds=given.clone(), use_cache=False).last_hidden_state
    finally:
        trunk.set_layers(layers)
    return torch.equal(received[0], given), torch.equal(result, made)


def hand_over_alike(decoder: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Let blocks that were loaded apart get their input as those of this decoder do."""
    found = [getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values()]
    for kept in found:
        if isinstance(kept, _HandOver):
            for layer in layers:
                kept.take_over(layer)


class _HandOver:
    """Gives the decoder's own input to whichever block runs first."""

    def __init__(self) -> None:
        self._hidden: torch.Tensor | None = None

    def install(self, trunk: Trunk) -> None:
        trunk.decoder.register_forward_pre_hook(self._keep, with_kwargs=True)
        for layer in trunk.layers:
            layer.register_forward_pre_hook(self._give, with_kwargs=True)

    def take_over(self, layer: nn.Module) -> None:
        """Give to a block to which another one has given so far."""
        for number, hook in layer._forward_pre_hooks.items():
            if isinstance(getattr(hook, "__self__", None), _HandOver):
                layer._forward_pre_hooks[number] = self._give

    def _keep(
        self, _decoder: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._hidden = named["inputs_embeds"]
        # The decoder gets a copy, because CTRL changes what it gets in place.
        return inputs, {**named, "inputs_embeds": self._hidden.clone()}

    def _give(
        self, _layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._hidden is None:
            return None
        hidden, self._hidden = self._hidden, None
        return with_input_state(inputs, named, hidden)
