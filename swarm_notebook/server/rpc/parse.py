"""From messages to requests: what a peer asks for, believed only after every field was checked.

A peer may send anything. Each function here turns a protobuf into a small dataclass or raises
`BadRequest` with the field, what was found and what is expected. A request carries tensors by
position; an unused slot holds a dummy. A tensor's shape, dtype and size are compared with what is
expected before it is unpacked: until then it is a `_Slot`, and takes no memory but its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swarm_notebook.errors import BadRequest, CacheFull
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.server.engine.requests import Backward, Forward, Limits, Step, StepTimes
from swarm_notebook.server.rpc import fields, petals_push

MAX_ROWS = 4096
MAX_TENSORS = 8

_MASK_DTYPES = (torch.uint8, torch.bool, torch.int64, torch.int32)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A tensor of a request, still packed; its bytes match its layout."""

    message: PackedTensor
    layout: tensors.TensorLayout

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    def unpack(self) -> torch.Tensor:
        return tensors.unpack(self.message, self.layout)

    def unpack_values(self, name: str) -> torch.Tensor:
        """The tensor, which is to have finite floating point numbers."""
        if not self.dtype.is_floating_point:
            raise BadRequest(f"{name}: dtype {self.dtype}, expected floating point")
        tensor = self.unpack()
        if not tensors.all_finite(tensor):
            raise BadRequest(f"{name}: a value is NaN or infinite")
        return tensor


@dataclass(slots=True)
class StepMessage:
    """A step, and how it is to be answered.

    Attributes:
        compression: of the hidden states in the answer, as `net.wire.tensors` has it.
        step_id: the same for all servers of a chain, and when the step comes twice.
        alloc_timeout: how many seconds it may wait for memory.
        push_to: the peer that gets the output besides the client, and the session there, or what
            else goes to it in Petals' form.
        print_seed: of the print of what was pushed; None: the client does not ask.
        copy_of: another session of the client and its last step, whose cache this one begins with.
    """

    step: Step
    compression: int = tensors.NONE
    step_id: str | None = None
    alloc_timeout: float | None = None
    push_to: tuple[str, str | petals_push.PetalsPush] | None = None
    print_seed: bytes | None = None
    copy_of: tuple[str, str] | None = None


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
    uid: str, packed: Sequence[PackedTensor], metadata: dict[str, Any], limits: Limits
) -> tuple[Forward, int]:
    """A forward request: ``[hidden, prompts, attention mask, position ids]``.

    Returns:
        the request, and the compression of its answer.
    """
    blocks = parse_blocks(uid, limits)
    found = _slots(packed)
    request = Forward(blocks, _read_hidden(found[0], limits))
    request.prompts = _read_prompts(found[1], request, limits, request.length)
    _read_common(request, found[2], found[3], metadata, limits)
    request.keep = fields.text(metadata, "keep")
    _read_dtype(request, metadata)
    return request, fields.compression(metadata.get("output_compression"))


def parse_backward(
    uid: str, packed: Sequence[PackedTensor], metadata: dict[str, Any], limits: Limits
) -> tuple[Backward, int]:
    """A backward request: ``[inputs, gradient, prompts, attention mask, position ids]``.

    Returns:
        the request, and the compression of its answer.
    """
    blocks = parse_blocks(uid, limits)
    found = _slots(packed)
    hidden = _read_hidden(found[0], limits)
    request = Backward(blocks, hidden, grad=_read_grad(found[1], hidden))
    request.prompts = _read_prompts(found[2], request, limits, request.length)
    _read_common(request, found[3], found[4], metadata, limits)
    if blocks[1] - 1 in request.states:
        raise BadRequest(
            f"states: the gradient at block {blocks[1] - 1} is what the request brings"
        )
    request.kept = fields.text(metadata, "kept")
    request.release = fields.flag(metadata, "release")
    _read_dtype(request, metadata)
    if request.dtype is not None and request.states:
        raise BadRequest(f"{protocol.COMPUTE_DTYPE}: gradients in another dtype have no states")
    return request, fields.compression(metadata.get("output_compression"))


def _read_dtype(request: Forward, metadata: dict[str, Any]) -> None:
    """What a pass is to be computed in, if that is another dtype than the server's."""
    request.dtype = fields.dtype(metadata, protocol.COMPUTE_DTYPE)
    more = request.inner or request.keep or request.seed is not None or request.by_row
    if request.dtype is not None and more:
        raise BadRequest(
            f"{protocol.COMPUTE_DTYPE}: a pass in another dtype gives no inner modules, keeps "
            "nothing, drops nothing out and tells adapters nothing row by row"
        )


def parse_step(
    message: PackedMessage,
    previous: tuple[int, int] | None,
    limits: Limits,
    times: StepTimes | None = None,
) -> StepMessage:
    """A session's step: ``[hidden, prompts, row ids, attention mask, position ids]``.

    Args:
        message: the request.
        previous: the blocks of the step before, which an empty ``uid`` repeats.
        limits: what this server hosts.
        times: where the step's time goes, from its arrival on; None: it arrives now.
    """
    times = times or StepTimes()
    repeated = previous if not message.uid else None
    blocks = repeated or parse_blocks(message.uid, limits)
    metadata = protocol.unpack_metadata(message.metadata)
    found = _slots(message.tensors)
    request = Step(blocks, _read_hidden(found[0], limits, cached=True), times=times)
    parsed = StepMessage(request, fields.compression(metadata.get("output_compression")))
    request.prompts = _read_prompts(found[1], request, limits, limits.context or limits.tokens)
    request.row_ids = _read_row_ids(found[2], request)
    _read_common(request, found[3], found[4], metadata, limits)
    request.position = fields.integer(metadata, "start_from_position")
    request.last = fields.integer(metadata, protocol.LAST_POSITIONS)
    parsed.step_id = fields.text(metadata, "step_id")
    parsed.alloc_timeout = fields.seconds(metadata, "alloc_timeout")
    fields.integer(metadata, "max_length")  # Petals reserves by it; our cache grows as needed
    fields.text(metadata, "session_id")
    if metadata.get(protocol.PUSH_TO) is not None:
        parsed.push_to = fields.target(metadata, protocol.PUSH_TO)
    elif metadata.get(protocol.NEXT_SERVERS) and request.prompts is None:
        behind = message.tensors[1:]
        parsed.push_to = petals_push.read(metadata, behind, limits.prefix, blocks[1])
    request.pushed = parsed.push_to is not None
    parsed.print_seed = fields.seed_of_prints(metadata)
    if previous is None and metadata.get(protocol.COPY_OF) is not None:
        if request.position is None:
            raise BadRequest(f"{protocol.COPY_OF}: such a step needs a start_from_position")
        parsed.copy_of = fields.session_and_step(metadata, protocol.COPY_OF)
    times.parsed()
    return parsed


def _read_common(
    request: Forward,
    mask: _Slot | None,
    position_ids: _Slot | None,
    metadata: dict[str, Any],
    limits: Limits,
) -> None:
    """Fill in what forward requests and steps have in common."""
    if mask is not None:
        request.attention_mask = _read_mask(mask, request)
    if position_ids is not None:
        request.position_ids = _read_position_ids(position_ids, request, limits)
    request.states = fields.states(metadata.get("states"), request.blocks)
    request.inner = fields.inner(metadata.get("inner"), request.blocks)
    request.rotary_length = fields.integer(metadata, "rotary_length") or None
    if metadata.get("adapter") is not None:
        request.adapter = fields.adapter(metadata["adapter"])
        request.by_row = fields.by_row(metadata.get("by_row"), request.rows)
        if fields.flag(metadata, "train"):
            request.seed = fields.integer(metadata, "seed") or 0
    if adapter := metadata.get("active_adapter"):
        raise BadRequest(
            f"active_adapter: {str(adapter)[: fields.MAX_TEXT]!r}, but this server has no adapters "
            "of its own"
        )


def _slots(packed: Sequence[PackedTensor]) -> list[_Slot | None]:
    """The tensors by position, None for unused ones."""
    if not 1 <= len(packed) <= MAX_TENSORS:
        raise BadRequest(f"a request has {len(packed)} tensors, expected 1 to {MAX_TENSORS}")
    found: list[_Slot | None] = []
    for message in packed:
        if len(message.size) < 3 and 0 in message.size:
            found.append(None)  # Petals' test of an unused slot
        else:
            found.append(_Slot(message, tensors.layout(message)))
    return found + [None] * (5 - len(found))


def _read_hidden(slot: _Slot | None, limits: Limits, *, cached: bool = False) -> torch.Tensor:
    """The hidden states, no more than the server takes at once, or holds if they are cached."""
    if slot is None or len(slot.shape) != 3 or slot.shape[2] != limits.hidden_size:
        found = "nothing" if slot is None else f"shape {list(slot.shape)}"
        raise BadRequest(
            f"hidden states: {found}, expected [rows, positions, {limits.hidden_size}]"
        )
    rows, length, _ = slot.shape
    if not 1 <= rows <= MAX_ROWS:
        raise BadRequest(f"hidden states: {rows} rows, expected 1 to {MAX_ROWS}")
    if limits.context is not None and length > limits.context:
        raise BadRequest(f"hidden states: {length} positions, the model has {limits.context}")
    if rows * length > limits.tokens and cached:
        raise CacheFull(
            f"the session needs {rows * length} cache tokens (rows x positions), more than the "
            f"{limits.tokens} that this server has; use fewer rows or shorter prompts, or start "
            "the server with more --cache-tokens"
        )
    if rows * length > limits.tokens:
        raise BadRequest(
            f"hidden states: {rows} rows of {length} positions, "
            f"at most {limits.tokens} tokens are taken in one request; send fewer rows at a time"
        )
    return slot.unpack_values("hidden states")


def _read_grad(slot: _Slot | None, hidden: torch.Tensor) -> torch.Tensor:
    if slot is None or slot.shape != hidden.shape:
        found = "nothing" if slot is None else f"shape {list(slot.shape)}"
        raise BadRequest(f"gradient: {found}, expected that of the inputs {list(hidden.shape)}")
    return slot.unpack_values("gradient")


def _read_prompts(
    slot: _Slot | None, request: Forward, limits: Limits, longest: int
) -> torch.Tensor | None:
    """Deep prompts for up to ``longest`` positions."""
    if slot is None:
        return None
    blocks = request.blocks[1] - request.blocks[0]
    if (
        len(slot.shape) != 4
        or slot.shape[0] != blocks
        or slot.shape[1] not in (1, request.rows)
        or slot.shape[2] > longest
        or slot.shape[3] != limits.hidden_size
    ):
        raise BadRequest(
            f"prompts: shape {list(slot.shape)}, expected [{blocks}, 1 or {request.rows}, "
            f"up to {longest}, {limits.hidden_size}]"
        )
    return slot.unpack_values("prompts")


def _read_row_ids(slot: _Slot | None, request: Forward) -> list[int] | None:
    if slot is None:
        return None
    if slot.dtype not in (torch.int64, torch.int32) or slot.shape != (request.rows,):
        raise BadRequest(
            f"hypo_ids: {slot.dtype} of shape {list(slot.shape)}, expected int64 [{request.rows}]"
        )
    ids: list[int] = slot.unpack().tolist()
    if min(ids) < 0:
        raise BadRequest(f"hypo_ids: row {min(ids)} does not exist")
    return ids


def _read_mask(slot: _Slot, request: Forward) -> torch.Tensor:
    expected = (request.rows, request.length)
    if slot.dtype not in _MASK_DTYPES or slot.shape != expected:
        raise BadRequest(
            f"attention mask: {slot.dtype} of shape {list(slot.shape)}, expected uint8 "
            f"{list(expected)} for the new positions"
        )
    mask = slot.unpack().to(torch.int64)
    if mask.numel() and not 0 <= int(mask.min()) <= int(mask.max()) <= 1:
        raise BadRequest("attention mask: a value is neither 0 nor 1")
    return mask


def _read_position_ids(slot: _Slot, request: Forward, limits: Limits) -> torch.Tensor:
    if (
        slot.dtype not in (torch.int64, torch.int32)
        or len(slot.shape) != 2
        or slot.shape[0] not in (1, request.rows)
        or slot.shape[1] != request.length
    ):
        raise BadRequest(
            f"position ids: {slot.dtype} of shape {list(slot.shape)}, "
            f"expected int64 [1 or {request.rows}, {request.length}]"
        )
    tensor = slot.unpack()
    top = limits.context or fields.MAX_COUNT
    # OPT counts padding as -1.
    if tensor.numel() and not -1 <= int(tensor.min()) <= int(tensor.max()) < top:
        raise BadRequest(f"position ids: a value is outside [-1, {top})")
    return tensor.to(torch.int64)
