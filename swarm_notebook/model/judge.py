"""Blocks at home for a moment, to decide whether a server's answer is right.

One block after the other is read from the checkpoint, run and let go: it takes the memory of one,
and the time of reading them. Nothing of the model in use is touched.
"""

from __future__ import annotations

from typing import Any

import torch

from swarm_notebook.checkpoint.partial import load_blocks
from swarm_notebook.checkpoint.source import ModelSource
from swarm_notebook.client.request import Request
from swarm_notebook.errors import Unsupported


class HomeJudge:
    """Computes requests with the weights of a checkpoint."""

    def __init__(self, source: ModelSource):
        self._source = source

    @torch.inference_mode()
    def __call__(self, request: Request, dtype: torch.dtype) -> torch.Tensor:
        """The output of the last block, ``[rows, positions, hidden size]`` of ``dtype``.

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
        options: dict[str, Any] = {"use_cache": False}
        if request.mask is not None:
            options["attention_mask"] = request.mask.long()
        if request.position_ids is not None:
            options["position_ids"] = request.position_ids
        for block in range(request.start, request.end):
            if request.prompts is not None:
                prompt = request.prompts[block - request.start].to(hidden)
                hidden = hidden.clone()
                hidden[:, : prompt.shape[1]] += prompt
            model: Any = load_blocks(self._source, block, block + 1, dtype=dtype).model
            hidden = model(inputs_embeds=hidden, **options).last_hidden_state
        return hidden
