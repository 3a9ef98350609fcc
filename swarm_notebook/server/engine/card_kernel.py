"""What kernels ask of a card: how large it is, and to start before what is in front has ended.

A step of one token is hundreds of kernels of a few microseconds, and a card that waits for the end
of each before it starts the next idles for as long in between. NVIDIA's cards since Hopper start
programs of the next kernel as soon as all of the present one have said that they may be followed
(programmatic dependent launch, in the CUDA programming guide). What a kernel reads before it has
waited must have been there before the step: weights, no states. It waits before it lets itself be
followed, so what is two kernels in front has ended, too. On an H200 a product of one token by 4
bits that follows another one takes 5.3 us instead of 6.3, one by 8 bits 3.0 instead of 3.7.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def wait_and_be_followed(follows: tl.constexpr):
    """Go on when all that is in front has been written."""
    if follows:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@cache
def following(device: torch.device) -> dict[str, Any]:
    """What a kernel with `wait_and_be_followed` is launched with."""
    if (
        device.type != "cuda"
        or torch.version.hip is not None
        or torch.cuda.get_device_capability(device) < (9, 0)
    ):
        return {"FOLLOWS": False}
    from triton.backends.nvidia.compiler import CUDAOptions

    if "launch_pdl" not in CUDAOptions.__dataclass_fields__:  # of Triton before 3.3
        return {"FOLLOWS": False}
    return {"FOLLOWS": True, "launch_pdl": True}


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a card; 1 on a CPU, where Triton interprets kernels."""
    if device.type != "cuda":
        return 1
    found: int = torch.cuda.get_device_properties(device).multi_processor_count
    return found
