"""What a request asks for, believed only after every field has been checked.

A peer may send anything. Each function here turns a protobuf into a small dataclass or raises
`BadRequest` with the field, what was found and what is expected, before any memory beyond the
received bytes is taken. What depends on the state of a session (how many rows and positions its
cache has) is checked in `session`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.proto import runtime_pb2

from swarm_notebook.errors import BadRequest
from swarm_notebook.net import protocol, tensors
from swarm_notebook.server import fields

MAX_ROWS = 4096
MAX_TENSORS = 8

_MASK_DTYPES = (torch.uint8, torch.bool, torch.int64, torch.int32)


@dataclass(frozen=True)
class Limits:
    """What this server hosts, against which requests are checked.

    Attributes:
        context: the number of positions that the model has, or None if it has no limit.
        tokens: the most tokens (rows x positions) of one request without a cache.
    """

    prefix: str
    start: int
    end: int
    hidden_size: int
    context: int | None
    tokens: int


@dataclass(slots=True)
class Forward:
    """Hidden states to run through ``blocks``, without a cache or as a step of a session."""

    blocks: tuple[int, int]
    hidden: torch.Tensor
    prompts: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    states: tuple[int, ...] = ()
    compression: int = tensors.NONE

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def length(self) -> int:
        return self.hidden.shape[1]


@dataclass(slots=True)
class Step(Forward):
    """One step of a session.

    Attributes:
        position: how many positions precede the new ones; None: all that the cache holds.
        row_ids: the cache's rows to go on with, None for all as they are.
        alloc_timeout: how many seconds the step may wait for memory.
    """

    position: int | None = None
    row_ids: list[int] | None = None
    step_id: str | None = None
    alloc_timeout: float | None = None


def parse_blocks(uid: str, limits: Limits) -> tuple[int, int]:
    """The block range that a request names, checked to be hosted here."""
    start, end = protocol.parse_uid_chain(uid, limits.prefix)
    if start < limits.start or end > limits.end:
        raise BadRequest(
            f"blocks [{start}, {end}) are not hosted here, "
            f"this server has [{limits.start}, {limits.end}) of {limits.prefix}"
        )
    return start, end


def parse_forward(
    uid: str, packed: Sequence[runtime_pb2.Tensor], metadata: dict[str, Any], limits: Limits
) -> Forward:
    """A forward request: ``[hidden, prompts, attention mask, position ids]``."""
    blocks = parse_blocks(uid, limits)
    slots = _slots(packed)
    request = Forward(blocks, _hidden(slots[0], limits))
    _check_size(request, limits)
    request.prompts = _prompts(slots[1], request, limits)
    _read_common(request, slots[2], slots[3], metadata, limits)
    return request


def parse_step(
    message: runtime_pb2.ExpertRequest, previous: tuple[int, int] | None, limits: Limits
) -> Step:
    """A session's step: ``[hidden, prompts, row ids, attention mask, position ids]``.

    Args:
        message: the request.
        previous: the blocks of the step before, which an empty ``uid`` repeats.
        limits: what this server hosts.
    """
    repeated = previous if not message.uid else None
    blocks = repeated or parse_blocks(message.uid, limits)
    metadata = protocol.unpack_metadata(message.metadata)
    slots = _slots(message.tensors)
    request = Step(blocks, _hidden(slots[0], limits))
    request.prompts = _prompts(slots[1], request, limits)
    request.row_ids = _row_ids(slots[2], request)
    _read_common(request, slots[3], slots[4], metadata, limits)
    request.position = fields.integer(metadata, "start_from_position")
    request.step_id = fields.text(metadata, "step_id")
    request.alloc_timeout = fields.seconds(metadata, "alloc_timeout")
    fields.integer(metadata, "max_length")  # Petals reserves by it; our cache grows as needed
    fields.text(metadata, "session_id")
    return request


def _slots(packed: Sequence[runtime_pb2.Tensor]) -> list[torch.Tensor | None]:
    """The tensors by position, None for unused ones."""
    if not 1 <= len(packed) <= MAX_TENSORS:
        raise BadRequest(f"a request has {len(packed)} tensors, expected 1 to {MAX_TENSORS}")
    slots: list[torch.Tensor | None] = []
    for message in packed:
        tensor = tensors.unpack(message)
        slots.append(None if protocol.is_dummy(tensor) else tensor)
    return slots + [None] * (5 - len(slots))


def _hidden(tensor: torch.Tensor | None, limits: Limits) -> torch.Tensor:
    if tensor is None or tensor.dim() != 3 or tensor.shape[2] != limits.hidden_size:
        found = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
        raise BadRequest(
            f"hidden states: {found}, expected [rows, positions, {limits.hidden_size}]"
        )
    rows = tensor.shape[0]
    if not 1 <= rows <= MAX_ROWS:
        raise BadRequest(f"hidden states: {rows} rows, expected 1 to {MAX_ROWS}")
    _check_values("hidden states", tensor)
    return tensor


def _prompts(tensor: torch.Tensor | None, request: Forward, limits: Limits) -> torch.Tensor | None:
    if tensor is None:
        return None
    blocks = request.blocks[1] - request.blocks[0]
    if (
        tensor.dim() != 4
        or tensor.shape[0] != blocks
        or tensor.shape[1] not in (1, request.rows)
        or tensor.shape[2] > request.length
        or tensor.shape[3] != limits.hidden_size
    ):
        raise BadRequest(
            f"prompts: shape {list(tensor.shape)}, expected [{blocks}, 1 or {request.rows}, "
            f"up to {request.length}, {limits.hidden_size}]"
        )
    _check_values("prompts", tensor)
    return tensor


def _row_ids(tensor: torch.Tensor | None, request: Forward) -> list[int] | None:
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


def _read_common(
    request: Forward,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    metadata: dict[str, Any],
    limits: Limits,
) -> None:
    """Fill in what forward requests and steps have in common."""
    if mask is not None:
        request.attention_mask = _mask(mask, request)
    if position_ids is not None:
        request.position_ids = _position_ids(position_ids, request, limits)
    request.states = fields.states(metadata.get("states"), request.blocks)
    request.compression = fields.compression(metadata.get("output_compression"))
    if adapter := metadata.get("active_adapter"):
        raise BadRequest(
            f"active_adapter: {str(adapter)[: fields.MAX_TEXT]!r}, but this server has no adapters"
        )


def _mask(tensor: torch.Tensor, request: Forward) -> torch.Tensor:
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


def _position_ids(tensor: torch.Tensor, request: Forward, limits: Limits) -> torch.Tensor:
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


def _check_size(request: Forward, limits: Limits) -> None:
    if limits.context is not None and request.length > limits.context:
        raise BadRequest(
            f"hidden states: {request.length} positions, the model has {limits.context}"
        )
    if request.rows * request.length > limits.tokens:
        raise BadRequest(
            f"hidden states: {request.rows} rows of {request.length} positions, "
            f"at most {limits.tokens} tokens are taken in one request; send fewer rows at a time"
        )


def _check_values(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise BadRequest(f"{name}: dtype {tensor.dtype}, expected floating point")
    # The largest magnitude is NaN or infinite if any value is: one pass, no mask in memory.
    if tensor.numel() and not math.isfinite(float(tensor.abs().max())):
        raise BadRequest(f"{name}: a value is NaN or infinite")
