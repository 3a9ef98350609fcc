"""Memory of the machine for what comes from a card.

A tensor that torch makes on the CPU lies in fresh pages of 4 KB, each of which is a fault when it
is first written to: 16 MB (2,048 positions of an 8B model) took 8 to 25 ms in a virtual machine
with an H200. Numpy asks for huge pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU that holds anything."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(*shape, dtype=dtype)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).reshape(*shape)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU: itself if it is there."""
    return tensor if tensor.is_cpu else empty(tensor.shape, tensor.dtype).copy_(tensor)
