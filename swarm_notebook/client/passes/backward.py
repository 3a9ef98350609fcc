"""A backward pass over the chain of servers that its forward pass took.

Each server gets the input of its blocks (which the notebook has kept) and the gradient of their
output, and returns the gradient of the input, of the boundaries asked for, of deep prompts and of
adapter weights. Groups of rows flow through the chain in the other direction, as a pipeline. When
a server is gone, its part alone is computed again on others: forward, to learn the inputs at the
new boundaries, and back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from swarm_notebook.client.adapters import call_with_adapter
from swarm_notebook.client.passes.call import CallAnswer, server_name
from swarm_notebook.client.passes.forward import (
    Trail,
    forward,
    give_up,
    take_rows,
    together,
)
from swarm_notebook.client.passes.padding import is_plain, put_back, without_padding
from swarm_notebook.client.request import (
    Request,
    answer_bytes,
    beside_loop,
    check_finite,
    check_layout,
    read_tensor,
    refuse_extensions,
)
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.errors import BadRequest, MissingBlocks, NotAMember, RemoteError, ServerFailed
from swarm_notebook.net.wire import protocol


@dataclass
class PassGradients:
    """Gradients of one backward pass.

    Attributes:
        input: of the first block's input.
        states: of the outputs of the blocks asked for.
        prompts: of deep prompts by block, ``[batch, length, hidden]``.
        weights: of adapter parameters, by name.
    """

    input: torch.Tensor
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    prompts: dict[int, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


async def backward(
    directory: Directory,
    request: Request,
    trails: Sequence[Trail],
    grad: torch.Tensor,
    states: Collection[int],
    *,
    doubted: bool = False,
) -> PassGradients:
    """Gradients of ``sum(output * grad)``, where the output is that of block ``request.end - 1``.

    Args:
        request: what the forward pass was asked, possibly cut short at the end.
        trails: what it left.
        grad: ``[batch, length, hidden]``.
        states: blocks whose outputs' gradients are wanted as well.
        doubted: a server has refused the request before; a second one is believed.

    Raises:
        MissingBlocks: no server holds a block, and none came in time.
        BadRequest: two servers, or the only one, found the request invalid.
    """
    parts = await together(
        [
            _backward_rows(
                directory,
                replace(take_rows(request, trail.rows), states=list(states), inner=()),
                trail,
                grad[trail.rows],
                doubted,
            )
            for trail in trails
        ]
    )
    return _join(parts)


async def _backward_rows(
    directory: Directory, request: Request, trail: Trail, grad: torch.Tensor, doubted: bool
) -> PassGradients:
    gathered = PassGradients(grad)
    for segment, hidden, kept in reversed(trail.segments):
        if segment.start >= request.end:
            continue
        end = min(segment.end, request.end)
        part = request.part(segment.start, end, hidden)
        used = RouteSegment(segment.span, segment.start, end)
        if directory.is_left(segment.peer):
            got = await _repeat(directory, part, gathered.input)
        else:
            got = await _ask(directory, used, part, gathered.input, kept, doubted=doubted)
        gathered.input = got.input
        gathered.states.update(got.states)
        gathered.prompts.update(got.prompts)
        gathered.weights.update(got.weights)
        if segment.start - 1 in request.states:
            gathered.states[segment.start - 1] = got.input
    return gathered


async def _ask(
    directory: Directory,
    segment: RouteSegment,
    part: Request,
    grad: torch.Tensor,
    kept: str | None,
    *,
    doubted: bool,
) -> PassGradients:
    """A part of the server that went forward, or of others if it fails."""
    try:
        got = await backward_segment(directory, segment, part, grad, kept)
    except (BadRequest, NotAMember) as error:
        if doubted:
            raise
        return await _ask_another(directory, segment, part, grad, error)
    except RemoteError as error:
        give_up(directory, segment, error)
        return await _repeat(directory, part, grad)
    directory.succeeded(segment.peer)
    if directory.audits is not None:
        directory.audits.went_back(segment, part, grad, got)
    return got


async def _ask_another(
    directory: Directory,
    segment: RouteSegment,
    part: Request,
    grad: torch.Tensor,
    error: BadRequest | NotAMember,
) -> PassGradients:
    """A part that one server called wrong, which may be wrong itself; what two say is believed."""
    try:
        directory.chain(part.start, part.end, [segment.peer])
    except MissingBlocks:
        raise error from None
    give_up(directory, segment, error)
    try:
        return await _repeat(directory, part, grad, doubted=True)
    except (BadRequest, NotAMember):
        directory.succeeded(segment.peer)  # it was right
        raise


async def _repeat(
    directory: Directory, part: Request, grad: torch.Tensor, *, doubted: bool = False
) -> PassGradients:
    """A lost server's part, on whatever servers there are now."""
    _, trails = await forward(directory, part, keep=True)
    return await backward(directory, part, trails, grad, part.states, doubted=doubted)


async def backward_segment(
    directory: Directory,
    segment: RouteSegment,
    part: Request,
    grad: torch.Tensor,
    kept: str | None = None,
) -> PassGradients:
    """The gradients of one server's part of a pass, whatever becomes of them.

    Args:
        grad: of the output of block ``part.end - 1``, ``[batch, length, hidden]``.
        kept: the name under which the server may have kept the activations.

    Raises:
        RemoteError: what the server says, or what is wrong with it.
    """
    if segment.span.extended or is_plain(part):
        return await _backward_once(directory, segment, part, grad, kept)
    groups = without_padding(part, server_name(segment))
    got = await together(
        [
            _backward_once(directory, segment, group.request(part), group.of(grad), kept)
            for group in groups
        ]
    )
    whole = PassGradients(put_back(groups, [one.input for one in got], part.hidden))
    if part.prompts is not None:
        like = part.hidden[:, : part.prompts.shape[2]]
        for block in range(part.start, part.end):
            # Rows whose padding is longer than the prompts had none.
            prompts = [
                one.prompts.get(block, like[: len(group.rows), :0])
                for group, one in zip(groups, got, strict=True)
            ]
            whole.prompts[block] = put_back(groups, prompts, like)
    return whole


async def _backward_once(
    directory: Directory, segment: RouteSegment, part: Request, grad: torch.Tensor, kept: str | None
) -> PassGradients:
    server = server_name(segment)
    refuse_extensions(segment.span, server, part)
    metadata = part.options() | ({"kept": kept} if kept else {})
    slots = [part.hidden, grad, part.prompts, part.mask, part.position_ids]
    rpc, most = protocol.RPC_BACKWARD_STREAM, _most(part)
    answer = await call_with_adapter(
        directory, segment, part.adapter, rpc, slots, metadata, always=3, most=most
    )
    return await beside_loop(answer.size, partial(_read, answer, part, server))


def _most(part: Request) -> int:
    """The most bytes that the gradients of a part may have."""
    prompts = 0
    if part.prompts is not None:
        prompts = part.prompts[:, :1].numel() * part.hidden.shape[0]
    adapter = {} if part.adapter is None else part.adapter.trained(part.start, part.end)
    values = prompts + sum(weights.numel() for weights in adapter.values())
    return answer_bytes(part) + values * max(part.hidden.itemsize, torch.float32.itemsize)


def _read(answer: CallAnswer, part: Request, server: str) -> PassGradients:
    """The gradients in an answer: input, prompts, states, adapter weights, in this order."""
    expected = {} if part.adapter is None else part.adapter.trained(part.start, part.end)
    names = answer.metadata.get("adapter_grads", []) if expected else []
    if not isinstance(names, (list, tuple)) or not set(names) <= expected.keys():
        raise ServerFailed(f"{server} sent gradients of parameters that this adapter has not")
    dtype, shape = part.hidden.dtype, part.hidden.shape
    wanted: list[tuple[str, torch.dtype, Sequence[int]]] = [("the input", dtype, shape)]
    if part.prompts is not None:
        length = part.prompts.shape[2]
        prompts = (part.end - part.start, shape[0], length, shape[2])
        wanted.append(("prompts", dtype, prompts))
    wanted += [(f"block {block}'s output", dtype, shape) for block in part.states]
    wanted += [(name, expected[name].dtype, expected[name].shape) for name in names]
    if len(answer.tensors) != len(wanted):
        raise ServerFailed(f"{server} sent {len(answer.tensors)} gradients, not {len(wanted)}")
    # All shapes first: nothing is unpacked of an answer that is not what was asked for.
    for packed, (_, kind, size) in zip(answer.tensors, wanted, strict=True):
        check_layout(packed, kind, size, server)
    found: list[torch.Tensor] = []
    for packed, (what, kind, size) in zip(answer.tensors, wanted, strict=True):
        found.append(read_tensor(packed, kind, size, server))
        check_finite(found[-1], f"gradients of {what}", server)
    unpacked = iter(found)
    gradients = PassGradients(next(unpacked))
    if part.prompts is not None:
        blocks = range(part.start, part.end)
        gradients.prompts = dict(zip(blocks, next(unpacked), strict=True))
    gradients.states = {block: next(unpacked) for block in part.states}
    gradients.weights = {name: next(unpacked) for name in names}
    return gradients


def _join(groups: Sequence[PassGradients]) -> PassGradients:
    """Gradients of all groups of rows: of rows side by side, of weights added up."""
    first = groups[0]
    if len(groups) == 1:
        return first
    return PassGradients(
        torch.cat([group.input for group in groups]),
        {key: torch.cat([group.states[key] for group in groups]) for key in first.states},
        {key: torch.cat([group.prompts[key] for group in groups]) for key in first.prompts},
        {
            name: torch.stack([group.weights[name] for group in groups]).sum(0)
            for name in first.weights
        },
    )
