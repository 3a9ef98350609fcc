"""The tensors of a request, each checked for shape, dtype and values before it is believed.

A request carries tensors by position; an unused slot holds a dummy. Whatever is wrong is a
`BadRequest` that names the tensor, what was found and what is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from hivemind.proto import runtime_pb2

from swarm_notebook.errors import BadRequest
from swarm_notebook.net import tensors
from swarm_notebook.server import fields

if TYPE_CHECKING:
    from swarm_notebook.server.requests import Forward, Limits

MAX_ROWS = 4096
MAX_TENSORS = 8

_MASK_DTYPES = (torch.uint8, torch.bool, torch.int64, torch.int32)


def unpack(packed: Sequence[runtime_pb2.Tensor]) -> list[torch.Tensor | None]:
    """The tensors by position, None for unused ones."""
    if not 1 <= len(packed) <= MAX_TENSORS:
        raise BadRequest(f"a request has {len(packed)} tensors, expected 1 to {MAX_TENSORS}")
    found: list[torch.Tensor | None] = []
    for message in packed:
        if 0 in message.size and len(message.size) < 3:
            found.append(None)  # a dummy (`protocol.is_dummy`), known without unpacking it
        else:
            found.append(tensors.unpack(message))
    return found + [None] * (5 - len(found))


def hidden(tensor: torch.Tensor | None, limits: Limits) -> torch.Tensor:
    if tensor is None or tensor.dim() != 3 or tensor.shape[2] != limits.hidden_size:
        found = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
        raise BadRequest(
            f"hidden states: {found}, expected [rows, positions, {limits.hidden_size}]"
        )
    rows = tensor.shape[0]
    if not 1 <= rows <= MAX_ROWS:
        raise BadRequest(f"hidden states: {rows} rows, expected 1 to {MAX_ROWS}")
    check_values("hidden states", tensor)
    return tensor


def grad(tensor: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    if tensor is None or tensor.shape != hidden.shape:
        found = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
        raise BadRequest(f"gradient: {found}, expected that of the inputs {list(hidden.shape)}")
    check_values("gradient", tensor)
    return tensor


def prompts(
    tensor: torch.Tensor | None, request: Forward, limits: Limits, longest: int
) -> torch.Tensor | None:
    """Deep prompts for up to ``longest`` positions."""
    if tensor is None:
        return None
    blocks = request.blocks[1] - request.blocks[0]
    if (
        tensor.dim() != 4
        or tensor.shape[0] != blocks
        or tensor.shape[1] not in (1, request.rows)
        or tensor.shape[2] > longest
        or tensor.shape[3] != limits.hidden_size
    ):
        raise BadRequest(
            f"prompts: shape {list(tensor.shape)}, expected [{blocks}, 1 or {request.rows}, "
            f"up to {longest}, {limits.hidden_size}]"
        )
    check_values("prompts", tensor)
    return tensor


def row_ids(tensor: torch.Tensor | None, request: Forward) -> list[int] | None:
    if tensor is None:
        return None
    if tensor.dtype not in (torch.int64, torch.int32) or tensor.shape != (request.rows,):
        raise BadRequest(
            f"hypo_ids: {tensor.dtype} of shape {list(tensor.shape)}, "
            f"expected int64 [{request.rows}]"
        )
    ids: list[int] = tensor.tolist()
    if min(ids) < 0:
        raise BadRequest(f"hypo_ids: row {min(ids)} does not exist")
    return ids


def mask(tensor: torch.Tensor, request: Forward) -> torch.Tensor:
    expected = (request.rows, request.length)
    if tensor.dtype not in _MASK_DTYPES or tensor.shape != expected:
        raise BadRequest(
            f"attention mask: {tensor.dtype} of shape {list(tensor.shape)}, expected uint8 "
            f"{list(expected)} for the new positions"
        )
    mask = tensor.to(torch.int64)
    if mask.numel() and not 0 <= int(mask.min()) <= int(mask.max()) <= 1:
        raise BadRequest("attention mask: a value is neither 0 nor 1")
    return mask


def position_ids(tensor: torch.Tensor, request: Forward, limits: Limits) -> torch.Tensor:
    if (
        tensor.dtype not in (torch.int64, torch.int32)
        or tensor.dim() != 2
        or tensor.shape[0] not in (1, request.rows)
        or tensor.shape[1] != request.length
    ):
        raise BadRequest(
            f"position ids: {tensor.dtype} of shape {list(tensor.shape)}, "
            f"expected int64 [1 or {request.rows}, {request.length}]"
        )
    top = limits.context or fields.MAX_COUNT
    # OPT counts padding as -1.
    if tensor.numel() and not -1 <= int(tensor.min()) <= int(tensor.max()) < top:
        raise BadRequest(f"position ids: a value is outside [-1, {top})")
    return tensor.to(torch.int64)


def check_values(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise BadRequest(f"{name}: dtype {tensor.dtype}, expected floating point")
    if not tensors.all_finite(tensor):
        raise BadRequest(f"{name}: a value is NaN or infinite")
