"""What the torch thread does for requests: forward and backward passes, kept activations.

One `Engine` per server. Its methods are jobs of the torch thread and run nowhere else; therefore
nothing in here is locked. What a notebook leaves on the server is filed under its peer id, so
that no two notebooks ever see each other's.
"""

from __future__ import annotations

import torch

from swarm_notebook.server import backward
from swarm_notebook.server.activations import Activations
from swarm_notebook.server.backward import Graph, NoRoomError
from swarm_notebook.server.requests import Backward, Forward
from swarm_notebook.server.span import Span


class Engine:
    """Runs requests through a span and keeps what notebooks ask it to keep."""

    def __init__(self, span: Span, activation_bytes: int):
        self._span = span
        self.activations: Activations[tuple[str, str], Graph] = Activations(activation_bytes)

    def forward(self, peer: str, request: Forward) -> list[torch.Tensor]:
        """The outputs that a forward request wants."""
        if request.keep is not None and request.length:
            try:
                return self._forward_and_keep(peer, request, request.keep)
            except NoRoomError:
                pass  # compute it again, without leaving anything behind
        return self._span.run(
            *request.blocks,
            request.hidden,
            attention_mask=request.attention_mask,
            position_ids=request.position_ids,
            prompts=request.prompts,
            states=request.states,
        )

    def backward(self, peer: str, request: Backward) -> list[torch.Tensor]:
        """The gradients that a backward request wants."""
        key = (peer, request.kept or "")
        graph = self.activations.get(key) if request.kept else None
        if graph is None or not graph.serves(request):
            return backward.recompute(self._span, request)
        gradients = graph.gradients(request, keep=not request.release)
        if request.release:
            self.activations.drop(lambda other, _: other == key)
        return gradients

    def facts(self) -> dict[str, int]:
        """Budgets and what is taken of them; may be called from any thread."""
        return {
            "activation_bytes": self.activations.total,
            "activation_bytes_held": self.activations.held,
        }

    def expire(self) -> None:
        """Forget what has not been used for long."""
        self.activations.expire()

    def _forward_and_keep(self, peer: str, request: Forward, name: str) -> list[torch.Tensor]:
        graph, size = backward.record(self._span, request, self.activations.make_room)
        self.activations.put((peer, name), graph, size)
        wanted = (request.blocks[1] - 1, *request.states)
        return [graph.outputs[index].detach() for index in wanted]
