"""Gradients through remote blocks: one autograd node per observed stretch, one trip for all.

A *segment* is what one request computed: blocks from where it was asked to the end. It is cut
into *pieces* at the observed boundaries, and each piece is one node of the autograd graph, so
that gradients at intermediate states exist (``retain_grad``, tensor hooks, auxiliary losses).

Backward mirrors forward. The first node that autograd calls is the last piece; it asks the swarm
for the gradients at all boundaries of its segment at once. An earlier piece then hands out what
came with them **if the gradient it is given is the very tensor that the piece behind it returned,
unchanged**. If something was added or scaled in between, it asks again from there. So plain
training costs one trip each way however many blocks are observed, and every other use is exact.

Gradients of gradients are not supported and raise, instead of being silently wrong.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from swarm_notebook.client.connection import Connection
from swarm_notebook.client.passes.backward import PassGradients
from swarm_notebook.client.passes.forward import Trail
from swarm_notebook.client.request import Request
from swarm_notebook.errors import Unsupported
from swarm_notebook.model.adapters.tuner_layers import Weights
from swarm_notebook.model.blocks.same import SameTensor
from swarm_notebook.model.calls.sending import sent_gradient


class Segment:
    """One request's forward pass, and the gradients that were fetched through it."""

    def __init__(
        self, connection: Connection, request: Request, trails: Sequence[Trail], weights: Weights
    ):
        self._connection, self._request, self._trails = connection, request, trails
        self._weights = weights
        self._starts: list[int] = []
        self._handed_out: dict[int, SameTensor] = {}
        self._fetched: PassGradients | None = None
        self._inside: list[tuple[int, str, weakref.ref[torch.Tensor]]] = []

    def watch(self, block: int, name: str, output: torch.Tensor) -> torch.Tensor:
        """An output of a module inside of a block, as `without_gradient` hands it out.

        A gradient that somebody waits for there (``retain_grad``, a tensor hook) never comes, as
        what follows was computed elsewhere: the backward pass says so.
        """
        given = without_gradient(output, name)
        self._inside.append((block, name, weakref.ref(given)))
        return given

    def _refuse_waiting(self, end: int) -> None:
        for block, name, known in self._inside:
            output = known() if block < end else None
            if output is not None and (output.retains_grad or output._backward_hooks):
                raise _no_gradient(f"gradients at the output of {name}")

    def node(
        self,
        start: int,
        end: int,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Attach ``output`` of blocks ``[start, end)`` to the graph, as made from ``hidden``."""
        self._starts.append(start)
        names, parameters = self._trainable(start, end)
        stretch = _Stretch(self, start, end, names)
        return _Piece.apply(stretch, [output], hidden, prompts, *parameters)

    def _trainable(self, start: int, end: int) -> tuple[list[str], list[torch.nn.Parameter]]:
        named = {
            name: parameter
            for block in range(start, end)
            for name, parameter in self._weights.get(block, {}).items()
            if parameter.requires_grad
        }
        return list(named), list(named.values())

    def gradients(self, start: int, end: int, grad: torch.Tensor) -> PassGradients:
        """What blocks ``[start, end)`` make of ``grad``, the gradient of their output."""
        self._refuse_waiting(end)
        expected = self._handed_out.get(end - 1)
        if self._fetched is None or expected is None or not expected.matches(grad):
            inner = [first - 1 for first in self._starts if self._request.start < first < end]
            sent = sent_gradient(grad, end - 1, self._request.hidden.dtype)
            self._fetched = self._connection.backward(
                replace(self._request, end=end, prompts=self._prompts(end)),
                self._trails,
                sent,
                inner,
            )
            states = {
                block: state.to(grad.device, grad.dtype)
                for block, state in self._fetched.states.items()
            }
            self._fetched.states = states
            self._handed_out = {block: SameTensor(state) for block, state in states.items()}
        return self._fetched

    def _prompts(self, end: int) -> torch.Tensor | None:
        prompts = self._request.prompts
        return None if prompts is None else prompts[: end - self._request.start]

    def input_gradient(self, start: int, fetched: PassGradients) -> torch.Tensor:
        """The gradient of a piece's input among what was fetched."""
        return fetched.input if start == self._request.start else fetched.states[start - 1]


@dataclass(frozen=True)
class _Stretch:
    """Blocks ``[start, end)`` of a segment, and the names of their trainable parameters."""

    segment: Segment
    start: int
    end: int
    names: list[str]


class _Piece(torch.autograd.Function):
    """Hands out a prefetched output; its backward hands out prefetched gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        stretch: _Stretch,
        output: list[torch.Tensor],
        hidden: torch.Tensor,
        *prompts_and_parameters: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.stretch = stretch
        parameters = [one for one in prompts_and_parameters[1:] if one is not None]
        ctx.devices = [hidden.device, *(parameter.device for parameter in parameters)]
        # Not to be read: torch refuses a backward pass if they were changed meanwhile.
        ctx.save_for_backward(*parameters)
        # In a list, as an input returned as it is would be a view, and no view of the message that
        # it came in: into parts of a view that a function returns no hook may write.
        state = output[0]
        place = state.storage_offset(), state.size(), state.stride()
        return state.new_empty(0).set_(state.untyped_storage(), *place)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        stretch: _Stretch = ctx.stretch
        # At once: a gradient that asks for another path only would pass a later refusal by.
        if torch.is_grad_enabled():
            raise Unsupported(_ONCE)
        if _is_batched(grad):
            raise Unsupported(_BATCHED)
        _ = ctx.saved_tensors
        start, end = stretch.start, stretch.end
        fetched = stretch.segment.gradients(start, end, grad)
        hidden = stretch.segment.input_gradient(start, fetched).to(ctx.devices[0], grad.dtype)
        prompts = None
        if fetched.prompts:
            # One row of prompts serves the whole batch.
            prompts = torch.stack([fetched.prompts[block] for block in range(start, end)])
            prompts = prompts.sum(1, keepdim=True)
        weights = [
            fetched.weights[name].to(device) if name in fetched.weights else None
            for name, device in zip(stretch.names, ctx.devices[1:], strict=True)
        ]
        return None, None, hidden, prompts, *weights


_ONCE = (
    "gradients of gradients (create_graph=True): servers give first derivatives only; leave "
    "create_graph out, or bring the blocks home: swarm.own(slice(None))"
)
_BATCHED = (
    "several gradients in one backward pass (is_grads_batched, vectorize=True): ask for one after "
    "the other with retain_graph=True, or bring the blocks home: swarm.own(slice(None))"
)


def _is_batched(grad: torch.Tensor) -> bool:
    return torch._C._functorch.is_batchedtensor(
        grad
    ) or torch._C._functorch.is_legacy_batchedtensor(grad)


def without_gradient(output: torch.Tensor, name: str) -> torch.Tensor:
    """The output of a module inside a remote block; asking for gradients through it raises.

    On a local model they would reach the weights and the block's input.
    """
    return _Ungraded.apply(output, torch.ones((), requires_grad=True), name)


class _Ungraded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, _anchor: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return output.clone()

    @staticmethod
    def backward(ctx: Any, _grad: torch.Tensor) -> NoReturn:
        raise _no_gradient(f"gradients through the output of {ctx.name}")


def _no_gradient(what: str) -> Unsupported:
    return Unsupported(
        f"{what}: of modules inside a remote block only values are sent; detach it, or bring the "
        "block home: swarm.own(block)"
    )
