"""What each token of a text shows, one by one as they come. Pure, for any tokenizer.

A byte-level vocabulary splits an emoji over several tokens, none of which is text by itself. The
tokens before the last show nothing, and the last one shows the character. Bytes that never become a
character are shown as the replacement character, once it is clear that they do not: a character has
at most four bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
_LONGEST = 4  # bytes of a character, so tokens of bytes


class Vocabulary:
    """The text of single tokens, out of any context, for lists of alternatives."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer: Any = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        # Some decoders drop the space before the first token: so something stands before it.
        self._anchor = self._tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._before = len(self.decode(self._anchor))
        self._known: dict[int, str] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included, spaces as they are."""
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def special(self, token: int) -> bool:
        """Whether it is a mark of the format, and no text."""
        return token in self._special

    def show(self, token: int) -> str:
        """The text of one token in the middle of a text; bytes by their name in the vocabulary."""
        if token not in self._known:
            text = self.decode([*self._anchor, token])[self._before :]
            if not text or BROKEN in text:
                text = str(self._tokenizer.convert_ids_to_tokens(token))
            self._known[token] = text
        return self._known[token]


class Pieces:
    """The pieces of text of a growing list of ids; joined they are the text.

    Args:
        vocabulary: of the model.
        before: ids that stand in front and are not shown.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] = ()):
        self._vocabulary = vocabulary
        self._ids = list(before[-_LONGEST:])
        self._skip = len(self._ids)
        self.texts: list[str] = []
        # Before each piece: where the decoded window begins, and how far it was shown.
        self._windows = [(0, self._skip)]

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        start, shown = self._windows[-1]
        self._ids.append(token)
        before = self._vocabulary.decode(self._ids[start:shown])
        now = self._vocabulary.decode(self._ids[start:])
        pending = len(self._ids) - shown
        if now.endswith(BROKEN) and pending < _LONGEST:
            text = ""
            self._windows.append((start, shown))
        else:
            text = now[len(before) :]
            self._windows.append((shown, len(self._ids)))
        self.texts.append(text)
        return text

    def truncate(self, length: int) -> None:
        """Forget all pieces from ``length`` on."""
        del self.texts[length:]
        del self._windows[length + 1 :]
        del self._ids[self._skip + length :]
