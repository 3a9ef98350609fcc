"""From a prompt to token ids, and from tokens to text while they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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


def callback_streamer(tokenizer: Any, stream: Callable[[str], None]) -> Any:
    """A streamer of transformers that hands each piece of new text to ``stream``."""
    from transformers import TextStreamer

    class CallbackStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                stream(text)

    return CallbackStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
