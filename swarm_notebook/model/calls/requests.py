"""What servers are asked: for a stretch of a call, for its history, for a block by itself."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from swarm_notebook.client.request import Request
from swarm_notebook.client.session.history import Pass
from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.blanks import is_blank
from swarm_notebook.model.calls.call import Call
from swarm_notebook.model.calls.inputs import unusual_positions
from swarm_notebook.model.calls.rotary import Rotations
from swarm_notebook.model.calls.sending import sent


def request_of(
    call: Call, index: int, hidden: torch.Tensor, prompts: torch.Tensor | None, length: int | None
) -> Request:
    """What is asked of the chain from block ``index`` to the end of the present stretch.

    Args:
        prompts: of these blocks.
        length: that the rotary modules have come to.
    """
    end = call.end
    return Request(
        index,
        end,
        sent(hidden, index),
        call.position,
        mask=call.mask,
        position_ids=call.position_ids,
        states=sorted(block for block in call.states if index <= block < end - 1),
        prompts=detached(prompts, hidden.dtype),
        adapter=call.adapter,
        inner=[
            (block, name)
            for block, modules in call.inside.items()
            if index <= block < end
            for name, _ in modules
        ],
        seed=call.seed,
        rotary_length=length,
    )


def pass_of(call: Call, index: int, hidden: torch.Tensor, length: int | None) -> Pass:
    """What a session's history gets to know when block ``index`` is the first remote one."""
    return Pass(
        call.position,
        hidden.shape[1],
        {index: hidden.detach().to("cpu")},
        mask=call.mask,
        position_ids=call.position_ids,
        rotary_length=length,
    )


def detached(prompts: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Prompts as they travel."""
    return None if prompts is None else prompts.detach().to("cpu", dtype)


def request_alone(
    index: int, hidden: torch.Tensor, kwargs: dict[str, Any], rotations: Rotations
) -> Request:
    """What is asked for block ``index`` when it is called outside of the model's own forward.

    Args:
        hidden: ``[batch, length, hidden]``, the block's input.
        kwargs: what else it was called with.

    Raises:
        Unsupported: something in it cannot travel.
    """
    if is_blank(hidden):
        raise Unsupported(
            "torch.utils.checkpoint(use_reentrant=True) around a remote block: what it calls "
            "again was never here; pass use_reentrant=False, or bring the block home: "
            f"swarm.own({index})"
        )
    ids = _positions(index, kwargs, rotations)
    return Request(
        index,
        index + 1,
        sent(hidden, index),
        0,
        # With a mask a server finds no sequences packed in one row: a block alone never does.
        mask=None if ids is None else torch.ones(hidden.shape[:2], dtype=torch.uint8),
        position_ids=ids,
        rotary_length=rotations.length(hidden.shape[1] if ids is None else int(ids.max()) + 1),
    )


def _positions(index: int, kwargs: dict[str, Any], rotations: Rotations) -> torch.Tensor | None:
    """The positions, if they are unusual."""
    given = {name for name, value in kwargs.items() if isinstance(value, (torch.Tensor, Cache))}
    if unknown := sorted(given - {"position_ids", "position_embeddings"}):
        raise Unsupported(
            f"block {index} was called by itself with {unknown[0]}, as copies of blocks are "
            "(layer_replication of PEFT); call the model, or the block with hidden states and its "
            "positions only, or bring the blocks home before they are copied: "
            "swarm.own(slice(None))"
        )
    embeddings, ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
    if embeddings is not None:
        ids = rotations.positions(embeddings)
        if ids is None:
            raise Unsupported(
                f"block {index} was called by itself with position_embeddings that the model's own "
                "rotary embeddings did not make; pass what they return for position_ids, or bring "
                f"the block home: swarm.own({index})"
            )
    return unusual_positions(ids, 0)
