"""How many tokens to guess ahead, chosen while a text is generated.

A pass through the swarm costs about the same for one token as for several: mostly the way there
and back. transformers can guess the next tokens (here: by looking up how the text went on when it
last said the same) and have one pass verify them; what was guessed wrong is rolled back. The
outcome is exact: the same tokens for greedy decoding, the same distribution for sampling.

The best number of guesses depends on what a pass costs, what each further token in it costs, and
how often guesses are right. `DraftLength` learns all three from the passes as they come, and picks
the number with the most expected tokens per second.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

# "auto", how many tokens to look up, or the model that guesses.
Draft = str | int | PreTrainedModel | None

# Guesses before the costs of a pass are known, and at the most: a step above 64 tokens no longer
# shares a batch. Prompt lookup looks for runs of `NGRAM` tokens: shorter ones repeat by chance.
FIRST_GUESSES = 6
MAX_GUESSES = 32
NGRAM = 3

# How much an older pass counts for each newer one, in what a pass costs and in what was right.
_FADE_COST = 0.95
_FADE_RIGHT = 0.85
# What is believed before anything was measured, and worth how many observations.
_RIGHT, _RIGHT_WEIGHT = 0.75, 2.0
_SHARE_PER_TOKEN, _SHARE_WEIGHT = 0.05, 1.0


class DraftLength:
    """What is known of passes and guesses, and the number of guesses that follows. Pure code."""

    def __init__(self) -> None:
        self._accepted = _RIGHT * _RIGHT_WEIGHT
        self._judged = _RIGHT_WEIGHT
        # Faded sums for a line through (tokens, seconds): 1, x, y, xx, xy.
        self._sums = [0.0] * 5

    @property
    def right(self) -> float:
        """The estimated chance that the next guess is right, given that those before it were."""
        return min(self._accepted / self._judged, 0.99)

    def observe(self, guessed: int, accepted: int, seconds: float) -> None:
        """A pass with ``guessed`` tokens besides the known one; the first ``accepted`` were right.

        Args:
            seconds: what the pass took; 0 if that says nothing.
        """
        if guessed:
            # The first wrong guess is judged as well; what came after it is not.
            judged = accepted + (accepted < guessed)
            self._accepted = self._accepted * _FADE_RIGHT + accepted
            self._judged = self._judged * _FADE_RIGHT + judged
        if seconds > 0:
            x, y = 1.0 + guessed, seconds
            new = (1.0, x, y, x * x, x * y)
            self._sums = [_FADE_COST * old + add for old, add in zip(self._sums, new, strict=True)]

    def cost(self) -> tuple[float, float]:
        """Seconds of a pass with one token, and of each further token in it."""
        count, x, y, xx, xy = self._sums
        if not count:
            return 1.0, _SHARE_PER_TOKEN
        # A line, drawn towards the slope that is expected where the passes were all alike.
        mean_x, mean_y = x / count, y / count
        spread = xx - x * mean_x
        guess = _SHARE_PER_TOKEN * mean_y / (1.0 + _SHARE_PER_TOKEN * (mean_x - 1.0))
        slope = (xy - x * mean_y + _SHARE_WEIGHT * guess) / (spread + _SHARE_WEIGHT)
        slope = max(slope, 0.0)
        return max(mean_y + slope * (1.0 - mean_x), 1e-6), slope

    def best(self) -> int:
        """The number of guesses with the most expected tokens per second; at least 1."""
        first, further = self.cost()
        right, best, best_rate = self.right, 1, 0.0
        expected, chance = 1.0, 1.0
        for guesses in range(1, MAX_GUESSES + 1):
            chance *= right
            expected += chance
            rate = expected / (first + guesses * further)
            if rate > best_rate:
                best, best_rate = guesses, rate
        return best


class AdaptiveLookup(PromptLookupCandidateGenerator):
    """transformers' prompt lookup with as many guesses as pay off."""

    num_output_tokens: int

    def __init__(self, length: DraftLength, **options: Any):
        super().__init__(num_output_tokens=FIRST_GUESSES, **options)
        self._length = length
        self._asked = 0.0
        self._known = self._guessed = 0

    def get_candidates(
        self, input_ids: torch.LongTensor, **options: Any
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """The text with its guessed continuation."""
        found = super().get_candidates(input_ids, **options)
        self._guessed = found[0].shape[1] - input_ids.shape[1]
        self._asked = time.perf_counter()
        return found

    def update_candidate_strategy(
        self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int
    ) -> None:
        """Learn from a verified draft."""
        first = self._known == 0  # the pass of the prompt: its time says nothing of the others
        seconds = 0.0 if first else time.perf_counter() - self._asked
        self._known = input_ids.shape[1]
        self._length.observe(self._guessed, int(num_matches), seconds)
        self.num_output_tokens = self._length.best()


_choosing: ContextVar[DraftLength | None] = ContextVar("choosing", default=None)


@contextmanager
def drafts(draft: Draft, options: dict[str, Any]) -> Iterator[None]:
    """Within it, ``generate(**options)`` guesses ahead as ``draft`` says.

    Args:
        draft: see `Swarm.generate`.
        options: of `generate`; completed.

    Raises:
        ValueError: ``draft`` is none of what it may be.
    """
    several = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1) > 1
    if draft is None or several:
        yield
    elif draft == "auto":
        options["prompt_lookup_num_tokens"] = FIRST_GUESSES
        token = _choosing.set(DraftLength())
        try:
            yield
        finally:
            _choosing.reset(token)
    elif type(draft) is int and draft >= 0:
        if draft:
            options["prompt_lookup_num_tokens"] = draft
        yield
    elif isinstance(draft, PreTrainedModel):
        options["assistant_model"] = draft
        yield
    else:
        raise ValueError(f'draft: {draft!r}; expected "auto", a number of tokens, a model, or None')


def chosen_generator(model: Any, generation_config: Any, logits_processor: Any) -> Any:
    """The candidate generator of a generation within ``drafts("auto")``, or None."""
    length = _choosing.get()
    if length is None or generation_config.prompt_lookup_num_tokens is None:
        return None
    return AdaptiveLookup(
        length,
        eos_token_id=generation_config._eos_token_tensor,
        max_matching_ngram_size=generation_config.max_matching_ngram_size or NGRAM,
        max_length=generation_config.max_length,
        logits_processor=logits_processor,
        vocab_size=model.config.get_text_config().vocab_size,
    )
