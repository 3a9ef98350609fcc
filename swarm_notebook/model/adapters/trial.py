"""Whether layers of PEFT compute what servers compute: each token for itself, from hidden states.

Servers take a batch and a prompt in parts, and hand a layer nothing but its input. Most types of
adapters are content with that; the others are found here by running two tokens through a copy of
the layer, around a weight that takes no memory. Servers try the same around the real weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.base_modules import base_of

# Relative: rounding of bfloat16 is 0.4 %, tokens that see each other differ by tens of percents.
_CLOSE = 0.05


def try_out(tuner: nn.Module, block: int, path: str) -> None:
    """Run a copy of a layer around a linear one; any other is left to the servers.

    Raises:
        Unsupported: it wants more than its input, or lets tokens depend on each other.
    """
    from peft.tuners import ia3, loha, lokr, lora

    if isinstance(tuner, (ia3.Linear, loha.Linear, lokr.Linear, lora.Linear)):
        return  # they add to each token what they make of it
    base: Any = base_of(tuner)
    if not isinstance(base, nn.Linear):
        return
    kind = type(tuner).__module__.split(".")[2]
    twin = copy.deepcopy(tuner, {id(base): _hollow(base)}).eval()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in twin.parameters():
            if one.requires_grad and one.is_floating_point():
                one.copy_(torch.randn(one.shape, generator=noise))
        tokens = torch.randn(1, 2, base.in_features, generator=noise).to(base.weight)
        try:
            both, alone = (twin(part).float() for part in (tokens, tokens[:, :1]))
        except Exception as error:  # whatever PEFT raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise Unsupported(
                f"PEFT's {kind} in {path} of block {block} does not run on hidden states alone "
                f"({reason}); use another adapter type, or bring the blocks home: "
                "swarm.own(slice(None))"
            ) from error
    first = both[:, :1]
    if (alone - first).norm() > _CLOSE * first.norm():
        raise Unsupported(
            f"PEFT's {kind} lets the tokens of a batch depend on each other, and servers compute "
            "them in parts; use another adapter type, or bring the blocks home: "
            "swarm.own(slice(None))"
        )


def _hollow(base: nn.Linear) -> nn.Linear:
    """A linear layer of the same shape whose weight is one number."""
    linear = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
    for name, own in base._parameters.items():
        if own is not None:
            number = torch.full((), base.in_features**-0.5, dtype=own.dtype, device=own.device)
            made = nn.Parameter(number.expand(own.shape), requires_grad=False)
            linear._parameters[name] = made
    return linear
