"""What a remote block is given: beside hidden states, what its server computes by itself.

A decoder hands each block rotary embeddings, a mask and more. Of these nothing travels: a server
makes them anew from positions and the mask of the call. So what a hook, a wrapper or another rotary
module puts in their place would be without effect, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.blanks import is_blank
from swarm_notebook.model.calls.call import Call
from swarm_notebook.model.calls.rotary import Rotations


def refuse_changed(index: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse what hooks of block ``index`` have made of its arguments."""
    for name in before.keys() | after.keys():
        if name != "hidden_states" and not _same(before.get(name), after.get(name)):
            _refuse(index, name)


def refuse_others(index: int, call: Call, named: Mapping[str, Any], rotations: Rotations) -> None:
    """Refuse arguments that are not of the present call."""
    mask = named.get("attention_mask")
    if call.unmasked is None:
        call.unmasked = mask is None
    if call.unmasked and mask is not None and not call.layout.home:
        _refuse(index, "attention_mask")
    embeddings = named.get("position_embeddings")
    if embeddings is None or any(embeddings is known for known in call.embeddings):
        return
    if rotations.count > call.asked:
        ids, expected = rotations.positions(embeddings), call.position_ids
        if expected is None:
            expected = torch.arange(call.position, call.position + call.new)[None]
        if ids is None or not torch.equal(*torch.broadcast_tensors(ids, expected)):
            _refuse(index, "position_embeddings")
    call.embeddings.append(embeddings)


def refuse_other_kinds(index: int, hidden: object) -> None:
    if not isinstance(hidden, torch.Tensor):
        raise Unsupported(
            f"block {index} is given a {type(hidden).__name__} for its hidden states: a hook or a "
            "wrapper before it returned that; in transformers 5 blocks take and return a tensor"
        )


def refuse_blank(index: int, hidden: torch.Tensor, *, late: bool = False) -> None:
    """Refuse hidden states that were never here.

    Args:
        late: somebody began to look at the block while the model was running.
    """
    if late and is_blank(hidden):
        raise Unsupported(
            f"a hook was registered on block {index} while the model was running, too late to get "
            f"its states; register it before the call, or register one on block {index - 1} as well"
        )
    if is_blank(hidden):
        raise Unsupported(
            f"block {index} is called out of order, or the model changes the hidden states before "
            "it outside of any hook; register a forward hook on the block before"
        )


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, (bool, int, float, str)) and one == other


def _refuse(index: int, name: str) -> None:
    raise Unsupported(
        f"block {index} is given other {name} than the model makes for this call, but only hidden "
        "states are sent to a remote block; leave them as they are, or bring the block home: "
        f"swarm.own({index})"
    )
