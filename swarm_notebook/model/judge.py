"""Blocks at home for a moment, to decide whether a server's answer is right.

One block after the other is read from the checkpoint, run and let go: it takes the memory of one,
and the time of reading them. Nothing of the model in use is touched.
"""

from __future__ import annotations

from typing import Any

import torch

from swarm_notebook.checkpoint.files.source import ModelSource
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.client.passes.backward import PassGradients
from swarm_notebook.client.request import Request
from swarm_notebook.errors import Unsupported


class HomeJudge:
    """Computes requests with the weights of a checkpoint."""

    def __init__(self, source: ModelSource):
        self._source = source

    def __call__(
        self, request: Request, dtype: torch.dtype, grad: torch.Tensor | None = None
    ) -> torch.Tensor | PassGradients:
        """What the blocks make of a request.

        Args:
            grad: of the last block's output; None for a forward pass.

        Returns:
            the output of the last block, ``[rows, positions, hidden size]`` of ``dtype``; with
            ``grad`` the gradients of input and prompts.

        Raises:
            Unsupported: it was run with an adapter, or with rotary embeddings of a given length.
            ModelNotFound: the checkpoint lacks the weights.
        """
        if request.adapter is not None or request.rotary_length is not None:
            raise Unsupported(
                "passes with adapters, or with rotary embeddings that go by a length, are decided "
                "by other servers only"
            )
        hidden = request.hidden.to(dtype)
        inputs: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for block in range(request.start, request.end):
                inputs[block] = hidden
                if grad is None or block < request.end - 1:
                    hidden = self._block(request, block, hidden, _prompt_of(request, block, dtype))
        if grad is None:
            return hidden
        found = PassGradients(grad.to(dtype))
        for block in reversed(range(request.start, request.end)):
            given = inputs.pop(block).requires_grad_()
            prompt = _prompt_of(request, block, dtype)
            if prompt is not None:
                # Every row's own gradient, as servers give it.
                prompt = prompt.expand(len(given), -1, -1).clone().requires_grad_()
            with torch.enable_grad():
                output = self._block(request, block, given, prompt)
            wanted = [given] if prompt is None else [given, prompt]
            found.input, *of_prompt = torch.autograd.grad(output, wanted, found.input)
            if of_prompt:
                found.prompts[block] = of_prompt[0]
        return found

    def _block(
        self, request: Request, block: int, hidden: torch.Tensor, prompt: torch.Tensor | None
    ) -> torch.Tensor:
        if prompt is not None:
            length = prompt.shape[1]
            hidden = torch.cat([hidden[:, :length] + prompt, hidden[:, length:]], dim=1)
        options: dict[str, Any] = {"use_cache": False}
        if request.mask is not None:
            options["attention_mask"] = request.mask.long()
        if request.position_ids is not None:
            options["position_ids"] = request.position_ids
        model: Any = load_blocks(self._source, block, block + 1, dtype=hidden.dtype).model
        model.requires_grad_(False)
        output: torch.Tensor = model(inputs_embeds=hidden, **options).last_hidden_state
        return output


def _prompt_of(request: Request, block: int, dtype: torch.dtype) -> torch.Tensor | None:
    """The deep prompt of a block, ``[rows or 1, length, hidden size]``."""
    prompts = request.prompts
    return None if prompts is None else prompts[block - request.start].detach().to(dtype)
