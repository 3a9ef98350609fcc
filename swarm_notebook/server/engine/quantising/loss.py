"""What a model loses by few bits: its perplexity and its distributions, beside the whole weights'.

On the text of `calibration`, half of which no choice was made by. Whole blocks are read one at a
time; of the model around them embeddings, norm and head run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from swarm_notebook.checkpoint.parts.partial import DecoderInfo, load_blocks, load_edges
from swarm_notebook.server.engine.quantising.calibration import calibration_tokens
from swarm_notebook.server.engine.quantising.loading import load_quantised
from swarm_notebook.server.engine.quantising.measuring import output_error, run
from swarm_notebook.server.engine.quantising.memory import Memory

if TYPE_CHECKING:
    from swarm_notebook.checkpoint.files.source import ModelSource


@dataclass(frozen=True)
class Loss:
    """What all blocks of a model lose by packing.

    Attributes:
        bits: per weight, with scales.
        error: of the last block's output: mean square of the difference by mean square of it.
        perplexity: with the whole weights, and packed.
        divergence: Kullback-Leibler's, of the next token's distribution from the whole weights',
            in nats per token.
    """

    bits: float
    error: float
    perplexity: tuple[float, float]
    divergence: float

    @property
    def ratio(self) -> float:
        """By how much perplexity grows."""
        return self.perplexity[1] / self.perplexity[0]

    def __str__(self) -> str:
        whole, packed = self.perplexity
        return (
            f"{self.bits:.3g} bits per weight: perplexity {packed:.4g} instead of {whole:.4g} "
            f"(x {self.ratio:.3g}), divergence {self.divergence:.2g} nats per token, error of the "
            f"blocks' output {self.error:.1%}"
        )


@torch.inference_mode()
def measure_loss(
    source: ModelSource, *, bits: float, dtype: torch.dtype, device: str = "cpu"
) -> Loss:
    """Compare a model at ``bits`` per weight with itself as it is.

    Servers of it on this machine at these bits say from now on by how much perplexity grows.

    Raises: as `load_quantised`.
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    edges, info = load_edges(source, **options)
    tokens = calibration_tokens(source).to(device)
    begin: list[torch.Tensor] = []

    def kept(states: torch.Tensor) -> torch.Tensor:
        begin.append(states)
        return states

    _around(edges, info, tokens, kept)
    packed, told = load_quantised(source, 0, info.num_blocks, bits=bits, **options)
    outputs = [run(packed, begin[0])]
    del packed
    states = begin[0]
    for block in range(info.num_blocks):
        states = run(load_blocks(source, block, block + 1, **options), states)
    outputs.insert(0, states)
    logits = [_around(edges, info, tokens, partial(_given, one)).float() for one in outputs]
    distributions = [functional.log_softmax(one, dim=-1) for one in logits]
    whole, found = (
        float(functional.nll_loss(one[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp())
        for one in distributions
    )
    divergence = functional.kl_div(
        distributions[1], distributions[0], log_target=True, reduction="sum"
    )
    loss = Loss(
        told.bits,
        output_error(outputs[1], outputs[0]),
        (whole, found),
        float(divergence) / tokens.numel(),
    )
    Memory.of_loss(source, bits).write(loss.ratio)
    return loss


def _given(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return output


def _around(
    edges: nn.Module,
    info: DecoderInfo,
    tokens: torch.Tensor,
    blocks: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The logits, if ``blocks`` is what all blocks together make of the first one's input."""

    def forward(index: int) -> Callable[..., Any]:
        def call(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            found = blocks(hidden_states) if index == 0 else hidden_states
            return (found,) if info.returns_tuple else found

        return call

    for index, layer in enumerate(info.layers):
        vars(layer)["forward"] = forward(index)
    logits: torch.Tensor = edges(input_ids=tokens, use_cache=False).logits
    return logits
