"""Which text hidden states give away: the attack of a server that has the model's public weights.

At a block boundary a server holds one state per token. Two attacks, without any training data:

- *nearest entry*: the entry of the vocabulary whose embedding has the largest cosine with it;
- *greedy inversion*: token by token from the left. What came before is known by then, so a guess is
  tested by computing its state through the first blocks: the right one gives the observed state up
  to rounding. Guesses come from a linear map from states to embeddings, fitted on random tokens
  that went through the same blocks, and from what the model predicts after the tokens found so far.

That decoder states determine the text, and that this search finds it, is shown by Nikolaou et al.,
"Language Models are Injective and Hence Invertible" (arXiv 2510.15511, 2025), with guesses from
gradients. Measured on SmolLM2-135M, 28 tokens with a name and a number in them, float32: from the
states behind 1, 2, 3, 4, 6 and 8 blocks every token was found, in about a thousand guesses each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from swarm_notebook.checkpoint.files.source import ModelSource
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.checkpoint.states import input_state, output_state
from swarm_notebook.progress import Waiting

# Tokens of which the linear map learns, in rows of so many; measured: with 2,048 the right token of
# a state behind one block is among the first 37 of 49,152 guesses for all but three of 28 tokens,
# with 8,192 for all, in four times the time. The search makes up for the rest.
FIT_TOKENS, FIT_ROW = 4096, 32
# Of the mean square: what keeps the map from following single tokens.
_RIDGE = 1e-2
# Guesses of one token are tested in portions that double, the likeliest first.
_PORTION = 32
# The relative error below which a guess is the token: rounding explains it. Behind ten blocks
# bfloat16 makes 8e-3, float16 1e-3 and float32 1e-6 (`client.audit.limits`); the nearest wrong
# token seen was 20 times as far.
_SURE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
_SURE_ELSE = 1e-3

Map = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def at_rest(model: Any) -> Iterator[Any]:
    """A model without dropout and without gradients; as it was afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(training)


@dataclass(frozen=True)
class TextStates:
    """The states of one text.

    Attributes:
        ids: its tokens, ``[positions]``.
        states: what goes into block 0 and comes out of each block, float32 ``[positions, hidden
            size]``: boundary b is behind b blocks.
        logits: the model's own, ``[positions, vocabulary]``.
    """

    ids: torch.Tensor
    states: list[torch.Tensor]
    logits: torch.Tensor


class _Enough(Exception):
    """Leaves the model once block 0 was given its input."""


def observe(model: Any, ids: torch.Tensor) -> TextStates:
    """Run a text, ``[positions]``, and keep its states at all block boundaries."""
    blocks = model._runner.blocks
    states: dict[int, torch.Tensor] = {}

    def went_in(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[0] = input_state(args, kwargs)

    def keeper(boundary: int) -> Callable[..., None]:
        def came_out(_block: nn.Module, _args: Any, output: Any) -> None:
            states[boundary] = output_state(output)

        return came_out

    with ExitStack() as hooks, at_rest(model):
        hooks.enter_context(blocks[0].register_forward_pre_hook(went_in, with_kwargs=True))
        for index, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_hook(keeper(index + 1)))
        logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits
    kept = [states[boundary][0].detach().float() for boundary in range(len(blocks) + 1)]
    return TextStates(ids, kept, logits[0].float())


def nearest_entries(model: Any, state: torch.Tensor) -> torch.Tensor:
    """For each state ``[positions, hidden size]`` the entry of the vocabulary next to it."""
    table = _directions(model).to(state)
    return (normalize(state, dim=-1) @ table.T).argmax(-1).cpu()


def invert(
    model: Any,
    source: ModelSource,
    observed: TextStates,
    boundaries: Sequence[int],
    *,
    candidates: int,
    dtype: torch.dtype,
) -> dict[int, tuple[list[int], int]]:
    """Recover the tokens from the states at each of these boundaries, by that alone.

    Args:
        model: the remote model; its embeddings are used.
        source: the checkpoint of its first blocks.
        boundaries: from 1 on; the blocks before the last of them are loaded.
        candidates: how many guesses of a token are tested at most.
        dtype: what the servers compute in.

    Returns:
        for each boundary the tokens, and how many guesses were tested.

    Raises:
        ModelNotFound: the checkpoint lacks the weights.
    """
    found: dict[int, tuple[list[int], int]] = {}
    total, done = len(boundaries) * len(observed.ids), [0]
    with (
        Waiting("Reading the text", total=total, unit="tokens", count=lambda: done[0]) as waiting,
        torch.inference_mode(),
    ):
        for boundary in boundaries:
            waiting.say(f"Reading the text from the states after block {boundary - 1}")
            home = load_blocks(source, 0, boundary, dtype=model.dtype, device=model.device).model
            search = _Search(model, home, observed, candidates, dtype)
            tokens: list[int] = []
            for token in search.tokens(observed.states[boundary]):
                tokens.append(token)
                done[0] += 1
            found[boundary] = tokens, search.tested
    return found


class _Search:
    """The greedy inversion of one boundary's states."""

    def __init__(
        self,
        model: Any,
        home: Any,
        observed: TextStates,
        candidates: int,
        dtype: torch.dtype,
    ):
        self._model, self._home, self._observed = model, home, observed
        self._table, self._candidates = _directions(model), candidates
        self._sure = _SURE.get(dtype, _SURE_ELSE)
        self._cache: Any = None
        self.tested = 0

    def tokens(self, states: torch.Tensor) -> Iterator[int]:
        """One after another, each the best of its guesses."""
        # First states are of another kind: attention has nothing else to look at, and many models
        # park what they do not need there (Xiao et al., "Efficient Streaming Language Models with
        # Attention Sinks", arXiv 2309.17453, 2023).
        likely = self._map(1)(states[:1])
        if len(states) > 1:
            likely = torch.cat([likely, self._map(FIT_ROW)(states[1:])])
        found: list[int] = []
        for position, state in enumerate(states):
            closeness = likely[position] @ self._table.T
            order = closeness.topk(min(self._candidates, len(closeness))).indices
            token = self._best(state, self._guesses(order, found), found)
            found.append(token)
            self._outputs([token], found[:-1], keep=True)
            yield token

    def _guesses(self, order: torch.Tensor, found: list[int]) -> list[int]:
        """By the map, and by turns what the model expects after the tokens found so far.

        The logits at hand are those after the true tokens: an attacker has the same ones for as
        long as all that was found is right, and no others are used.
        """
        before = len(found)
        if not before or found != self._observed.ids[:before].tolist():
            return order.tolist()
        half = max(1, self._candidates // 2)
        logits = self._observed.logits[before - 1]
        expected = logits.topk(min(half, len(logits))).indices.to(order)
        width = min(len(expected), len(order))
        both = torch.stack([order[:width], expected[:width]], dim=1).flatten().tolist()
        return list(dict.fromkeys(both))

    def _best(self, state: torch.Tensor, guesses: list[int], before: list[int]) -> int:
        best, least, begin, portion = guesses[0], float("inf"), 0, _PORTION
        while begin < len(guesses) and least > self._sure:
            some = guesses[begin : begin + portion]
            outputs = self._outputs(some, before, keep=False)
            errors = (outputs.float() - state).norm(dim=-1) / state.norm().clamp_min(1e-30)
            index = int(errors.argmin())
            if float(errors[index]) < least:
                best, least = some[index], float(errors[index])
            begin, portion = begin + portion, 2 * portion
            self.tested += len(some)
        return best

    def _outputs(self, tokens: list[int], before: list[int], *, keep: bool) -> torch.Tensor:
        """The states ``[tokens, hidden size]`` if each of them came after ``before``."""
        rows = torch.tensor([[*before, token] for token in tokens])
        cache = self._cache
        if cache is not None and not keep:
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(len(tokens))
        hidden = into_block_0(self._model, rows)[:, -1:]
        given = self._home(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
        if keep:
            self._cache = given.past_key_values
        return given.last_hidden_state[:, 0]

    def _map(self, width: int) -> Map:
        """From states to directions of embeddings, fitted on rows of so many random tokens."""
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(len(self._table), (FIT_TOKENS // max(width, 2), width), generator=draw)
        hidden = into_block_0(self._model, ids)
        hidden = self._home(inputs_embeds=hidden, use_cache=False).last_hidden_state
        skip = 1 if width > 1 else 0
        wanted = ids[:, skip:].flatten().to(self._table.device)
        return _fit(hidden[:, skip:].flatten(0, 1).float(), self._table[wanted])


def into_block_0(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the model makes of tokens ``[rows, positions]`` before its blocks; asks no server."""
    taken: list[torch.Tensor] = []

    def leave(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append(input_state(args, kwargs))
        raise _Enough

    first = model._runner.blocks[0]
    try:
        with first.register_forward_pre_hook(leave, with_kwargs=True), at_rest(model):
            model(input_ids=ids.to(model.device), use_cache=False)
    except _Enough:
        return taken[0]
    raise RuntimeError("the model did not call its first block")


def _fit(states: torch.Tensor, wanted: torch.Tensor) -> Map:
    """The ridge regression from states to directions of embeddings."""
    mean, spread = states.mean(0), states.std(0) + 1e-6

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([(x - mean) / spread, x.new_ones(len(x), 1)], dim=1)

    inputs = scaled(states)
    square = inputs.T @ inputs
    square.diagonal().add_(_RIDGE * len(inputs))
    weights = torch.linalg.solve(square, inputs.T @ wanted)
    return lambda x: scaled(x) @ weights


def _directions(model: Any) -> torch.Tensor:
    return normalize(model.get_input_embeddings().weight.detach().float(), dim=-1)
