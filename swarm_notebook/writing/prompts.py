"""From a prompt to token ids, and from tokens to text while they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """What ``model.generate`` takes; a chat message if wanted and the tokenizer has a template."""
    if chat and tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    return tokenizer(prompt, return_tensors="pt")


def ids_of(text: str | Sequence[int] | torch.Tensor, tokenizer: Any, model: str) -> torch.Tensor:
    """The token ids of one text, ``[tokens]``; ids pass through.

    Args:
        model: its name, for who has no tokenizer.

    Raises:
        ValueError: there is no tokenizer for a text, or there are no tokens.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError(f"{model} comes without a tokenizer: pass tokenizer=…, or token ids")
        text = tokenizer(text)["input_ids"]
    ids = torch.as_tensor(text, dtype=torch.long).cpu()
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() == 1 and len(ids):
        return ids
    raise ValueError(
        "the text is empty"
        if ids.dim() == 1
        else f"one text is needed, not ids of shape {list(ids.shape)}"
    )


def callback_streamer(tokenizer: Any, stream: Callable[[str], None]) -> Any:
    """A streamer of transformers that hands each piece of new text to ``stream``."""
    from transformers import TextStreamer

    class CallbackStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                stream(text)

    return CallbackStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
