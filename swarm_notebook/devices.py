"""Where tensors live: what "auto" means on this machine, and whether it has what was named."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm_notebook.errors import DeviceMissing

AUTO = "auto"


def best_device() -> str:
    """What "auto" means: an NVIDIA or AMD card, else an Apple GPU, else the processor."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_named(name: str | torch.device) -> torch.device:
    """A device of this machine, such as ``"cuda:1"``; "auto" is `best_device`.

    Raises:
        DeviceMissing: this machine, or this build of torch, has none of this name.
    """
    try:
        device = torch.device(best_device() if name == AUTO else name)
        if device.type != "meta":  # it would compute nothing
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError):
        pass  # torch's reasons go from a missing driver to a build without one
    raise DeviceMissing(
        f"device: {str(name)!r} is not on this machine (torch {torch.__version__} finds "
        f"{_found()}); give one of these, or leave it out"
    )


def dtype_on(
    device: torch.device, checkpoint: torch.dtype | str | None, *, packed: bool
) -> torch.dtype:
    """What "auto" computes in on a device.

    Args:
        checkpoint: what the model's config says.
        packed: with weights of fewer bits.
    """
    if device.type == "cpu":
        # torch multiplies by 4 and 8 bits in bfloat16 alone.
        return torch.bfloat16 if packed else torch.float32
    halves = (torch.bfloat16, torch.float16)
    taken = next((half for half in halves if half == checkpoint), torch.float32)
    return taken if device.type != "mps" or _holds(device, taken) else torch.float32


def _holds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of a dtype can be there: Apple's GPUs have bfloat16 from macOS 14 on."""
    try:
        torch.empty(0, device=device, dtype=dtype)
    except (TypeError, RuntimeError):
        return False
    return True


def cards(wanted: Sequence[int] | None) -> list[str]:
    """The GPUs of this machine by their numbers; None: all.

    Raises:
        DeviceMissing: there are none, or not these.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = range(count) if wanted is None else wanted
    if not numbers or max(numbers) >= count:
        raise DeviceMissing(
            f"--gpus: this machine does not have them (torch {torch.__version__} finds "
            f"{_found()}); leave --gpus out for one server on what there is"
        )
    return [f"cuda:{number}" for number in numbers]


def _found() -> str:
    """The devices of this machine, for people."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = ["cpu", *(f"cuda:{index}" for index in range(count))]
    return ", ".join([*found, *(["mps"] if torch.backends.mps.is_available() else [])])
