"""What of the model's tensors travels: copies with finite numbers, which are all that servers take.

A local model computes on with NaN. A server does not, as what is cached of it would stay so; and an
answer with NaN is how a notebook knows that a server computes wrongly.
"""

from __future__ import annotations

import torch

from swarm_notebook.errors import Unsupported
from swarm_notebook.net.wire.tensors import all_finite


def sent(hidden: torch.Tensor, index: int) -> torch.Tensor:
    """A copy of a block's input that travels: hooks may write into what the model holds.

    Raises:
        Unsupported: servers would refuse it.
    """
    copied = hidden.detach().to("cpu", copy=True)
    if not all_finite(copied):
        raise Unsupported(
            f"block {index}: its input has NaN or infinite values, from a hook or the embeddings, "
            "and servers compute with finite ones only; replace them (torch.nan_to_num), or "
            f"bring the blocks from here on home: swarm.own(slice({index}, None))"
        )
    return copied


def sent_gradient(grad: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    """A copy of the gradient of a block's output that travels.

    Raises:
        Unsupported: servers would refuse it.
    """
    copied = grad.detach().cpu().to(dtype)
    if not all_finite(copied):
        raise Unsupported(
            f"block {block}: the gradient of its output has NaN or infinite values, and servers "
            "compute with finite ones only; leave such a step out (is the loss finite, or its "
            f"scale too large?), or bring the blocks home: swarm.own(slice(0, {block + 1}))"
        )
    return copied
