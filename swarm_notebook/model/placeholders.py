"""Parameters that are only a shape and a dtype: zero-stride views of one zero, without memory.

Unlike meta tensors they sit on a real device, so that PEFT puts real adapter weights beside them.
"""

from __future__ import annotations

import torch


def placeholder(tensor: torch.Tensor) -> torch.Tensor:
    """A zero of the same shape and dtype, on the same device, that takes no memory."""
    zero = torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    return zero.expand(tensor.shape)


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a shape without memory of its own."""
    return (
        tensor.numel() > 1
        and not tensor.is_meta
        and tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
    )
