"""What the model's caller passed, in the form in which it travels, or a clear refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from swarm_notebook.client.connection import Connection
from swarm_notebook.errors import ContextTooLong, Unsupported
from swarm_notebook.model.blocks.layout import Layout
from swarm_notebook.model.generation.cache import RemoteCache


def refuse_unknown(kwargs: Mapping[str, Any], config: Any, layout: Layout) -> None:
    """Refuse what remote blocks cannot give."""
    attentions = kwargs.get("output_attentions")
    attentions = config.output_attentions if attentions is None else attentions
    if attentions and not layout.home.issuperset(layout.order):
        raise Unsupported(
            "output_attentions: remote blocks return hidden states only; bring the blocks home "
            "with swarm.own(slice(None)), or one of them and hook its attention module"
        )
    if kwargs.get("encoder_hidden_states") is not None:
        raise Unsupported("encoder_hidden_states: remote blocks take hidden states only")


def without_values(tensor: torch.Tensor) -> bool:
    """Whether only shapes are wanted of a call."""
    return tensor.is_meta or type(tensor).__name__ == "FakeTensor"


def size(tokens: torch.Tensor) -> tuple[int, int]:
    """Rows and positions of ids, or of their embeddings.

    Raises:
        ValueError: they are no batch of sequences, or there is nothing in it.
    """
    if tokens.dim() < 2 or not tokens.numel():
        raise ValueError(
            f"the input has shape {list(tokens.shape)}; the model takes [batch, length], with at "
            "least one token"
        )
    rows, length = tokens.shape[:2]
    return rows, length


def promoted(hidden: torch.Tensor, block: nn.Module) -> torch.Tensor:
    """Hidden states of the dtype in which a block with such weights gives out what it computes."""
    if hidden.dtype == next(block.parameters()).dtype:
        return hidden
    dtypes = [one.dtype for one in block.parameters() if one.is_floating_point()]
    if not dtypes or hidden.dtype in dtypes:
        return hidden
    return hidden.to(torch.promote_types(hidden.dtype, dtypes[0]))


def check_cache(cache: object, connection: Connection, rows: int) -> None:
    """Refuse a cache that is not this model's, or not this batch's."""
    if cache is None:
        return
    if not isinstance(cache, RemoteCache):
        raise Unsupported(
            f"past_key_values is a {type(cache).__name__} that another model has filled; remote "
            "blocks keep their keys and values on the servers. Pass None, an empty cache, or what "
            "an earlier call of this model returned; for prefix tuning: tuning.DeepPrompts, or "
            "swarm.own(slice(None)), which brings all blocks home"
        )
    if cache.connection is not connection:
        raise ValueError("past_key_values belongs to another connection; start without it")
    if cache.length and cache.rows != rows:
        raise ValueError(f"the batch has {rows} rows, past_key_values has {cache.rows}")


def check_length(position: int, new: int, context: int | None) -> None:
    """Refuse more tokens than the model has positions."""
    if context is not None and position + new > context:
        raise ContextTooLong(
            f"{position + new} tokens ({position} cached, {new} new) are more than the model's "
            f"context of {context}; shorten the prompt"
        )


def new_mask(
    mask: object, cache: RemoteCache | None, new: int, *, remote: bool
) -> torch.Tensor | None:
    """The attention mask of the new tokens, uint8, or None if nothing is masked.

    Masks of other kinds, such as one of pairs of tokens, are for blocks at home alone.

    Args:
        remote: there are blocks that are not at home.
    """
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        if remote:
            raise Unsupported(
                "attention_mask: remote blocks take a mask of shape [batch, length] only; give "
                "each text a row of its own, or bring all blocks home with swarm.own(slice(None))"
            )
        mask = None
    if cache is not None:
        return cache.new_mask(mask, new)
    if mask is None:
        return None
    if mask.shape[1] != new:
        raise ValueError(f"attention_mask has length {mask.shape[1]}, the input has {new} tokens")
    return None if bool(mask.all()) else mask.detach().to("cpu", torch.uint8)


def unusual_positions(position_ids: torch.Tensor | None, position: int) -> torch.Tensor | None:
    """Position ids that differ from a plain count from ``position`` on, else None."""
    if position_ids is None:
        return None
    if position_ids.dim() != 2:
        raise Unsupported(
            f"position_ids of shape {list(position_ids.shape)}: remote blocks take [batch, length]"
        )
    ids = position_ids.detach().to("cpu", torch.int64)
    plain = torch.arange(position, position + ids.shape[1])
    return None if bool((ids == plain).all()) else ids
