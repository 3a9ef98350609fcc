"""What a request asks for, believed only after every field has been checked.

A peer may send anything. Each function here turns a protobuf into a small dataclass or raises
`BadRequest` with the field, what was found and what is expected, before any memory beyond the
received bytes is taken. What depends on the state of a session (how many rows and positions its
cache has) is checked in `session`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hivemind.proto import runtime_pb2

from swarm_notebook.errors import BadRequest
from swarm_notebook.net import protocol, tensors
from swarm_notebook.server import fields, onward, slots
from swarm_notebook.server.times import StepTimes


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
    """Hidden states to run through ``blocks``, without a cache or as a step of a session.

    Attributes:
        states: blocks whose outputs (in a backward: gradients) are wanted as well.
        inner: modules inside of blocks whose outputs are wanted as well.
        adapter: id and version of the peer's adapter to run the blocks with.
        seed: of the dropout in the adapter; None for none.
        keep: the id under which to keep the activations for a backward.
    """

    blocks: tuple[int, int]
    hidden: torch.Tensor
    prompts: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    states: tuple[int, ...] = ()
    inner: tuple[tuple[int, str], ...] = ()
    adapter: tuple[str, int] | None = None
    seed: int | None = None
    compression: int = tensors.NONE
    keep: str | None = None

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def length(self) -> int:
        return self.hidden.shape[1]

    def extras(self) -> dict[str, Any]:
        """What `Span.compute` is told only if it is asked for."""
        extras: dict[str, Any] = {"inner": self.inner} if self.inner else {}
        return extras if self.seed is None else {**extras, "seed": self.seed}


@dataclass(slots=True)
class Step(Forward):
    """One step of a session.

    Attributes:
        position: how many positions precede the new ones; None: all that the cache holds.
        row_ids: the cache's rows to go on with, None for all as they are.
        alloc_timeout: how many seconds the step may wait for memory.
        push_to: the peer that gets the output besides the client, and the session there, or what
            else goes to it in Petals' form.
        times: where its time goes, see `times`.
    """

    position: int | None = None
    row_ids: list[int] | None = None
    step_id: str | None = None
    alloc_timeout: float | None = None
    push_to: tuple[str, str | onward.Onward] | None = None
    times: StepTimes = field(default_factory=StepTimes)


@dataclass(slots=True)
class Backward(Forward):
    """A backward pass through ``blocks`` for the inputs ``hidden``.

    Attributes:
        grad: the gradient of the last block's output.
        kept: the id of a forward pass whose activations may still be there.
        release: nobody needs them after this.
    """

    grad: torch.Tensor = field(kw_only=True)
    kept: str | None = None
    release: bool = False


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
    found = slots.unpack(packed)
    request = Forward(blocks, slots.hidden(found[0], limits))
    _check_size(request, limits)
    request.prompts = slots.prompts(found[1], request, limits, request.length)
    _read_common(request, found[2], found[3], metadata, limits)
    request.keep = fields.text(metadata, "keep")
    return request


def parse_backward(
    uid: str, packed: Sequence[runtime_pb2.Tensor], metadata: dict[str, Any], limits: Limits
) -> Backward:
    """A backward request: ``[inputs, gradient, prompts, attention mask, position ids]``."""
    blocks = parse_blocks(uid, limits)
    found = slots.unpack(packed)
    hidden = slots.hidden(found[0], limits)
    request = Backward(blocks, hidden, grad=slots.grad(found[1], hidden))
    _check_size(request, limits)
    request.prompts = slots.prompts(found[2], request, limits, request.length)
    _read_common(request, found[3], found[4], metadata, limits)
    if blocks[1] - 1 in request.states:
        raise BadRequest(
            f"states: the gradient at block {blocks[1] - 1} is what the request brings"
        )
    request.kept = fields.text(metadata, "kept")
    request.release = fields.flag(metadata, "release")
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
    times = StepTimes()
    repeated = previous if not message.uid else None
    blocks = repeated or parse_blocks(message.uid, limits)
    metadata = protocol.unpack_metadata(message.metadata)
    found = slots.unpack(message.tensors)
    request = Step(blocks, slots.hidden(found[0], limits), times=times)
    request.prompts = slots.prompts(found[1], request, limits, limits.context or limits.tokens)
    request.row_ids = slots.row_ids(found[2], request)
    _read_common(request, found[3], found[4], metadata, limits)
    request.position = fields.integer(metadata, "start_from_position")
    request.step_id = fields.text(metadata, "step_id")
    request.alloc_timeout = fields.seconds(metadata, "alloc_timeout")
    fields.integer(metadata, "max_length")  # Petals reserves by it; our cache grows as needed
    fields.text(metadata, "session_id")
    if metadata.get(protocol.PUSH_TO) is not None:
        request.push_to = fields.target(metadata, protocol.PUSH_TO)
    elif metadata.get(protocol.NEXT_SERVERS) and request.prompts is None:
        behind = message.tensors[1:]
        request.push_to = onward.read(metadata, behind, limits.prefix, blocks[1])
    times.parsed()
    return request


def _read_common(
    request: Forward,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    metadata: dict[str, Any],
    limits: Limits,
) -> None:
    """Fill in what forward requests and steps have in common."""
    if mask is not None:
        request.attention_mask = slots.mask(mask, request)
    if position_ids is not None:
        request.position_ids = slots.position_ids(position_ids, request, limits)
    request.states = fields.states(metadata.get("states"), request.blocks)
    request.inner = fields.inner(metadata.get("inner"), request.blocks)
    if metadata.get("adapter") is not None:
        request.adapter = fields.adapter(metadata["adapter"])
        if fields.flag(metadata, "train"):
            request.seed = fields.integer(metadata, "seed") or 0
    request.compression = fields.compression(metadata.get("output_compression"))
    if adapter := metadata.get("active_adapter"):
        raise BadRequest(
            f"active_adapter: {str(adapter)[: fields.MAX_TEXT]!r}, but this server has no adapters "
            "of its own"
        )


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
