"""Every family's remote model against the local one: same weights, float32, real servers.

Two servers hold an uneven split of each tiny model. What a user does to a causal LM is compared
with the local model's result: logits, hidden states, greedy and beam search, left-padded batches,
cached decoding, several turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pairs import Pair, close, pair_of
from support.tiny import FAMILIES, tiny_model

from swarm_notebook.checkpoint.files.source import resolve


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder: Path = tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    blocks = resolve(folder).config().num_hidden_layers
    with pair_of(folder, [(0, 1), (1, blocks)]) as made:
        yield made


@torch.no_grad()
def test_is_the_models_own_class(pair: Pair) -> None:
    assert isinstance(pair.remote, type(pair.local))
    ours = [(name, parameter.shape) for name, parameter in pair.remote.named_parameters()]
    assert ours == [(name, parameter.shape) for name, parameter in pair.local.named_parameters()]


@torch.no_grad()
@pytest.mark.works("Calls: logits, `output_hidden_states`")
def test_logits_and_hidden_states(pair: Pair) -> None:
    ids = pair.ids(2, 11)
    ours = pair.remote(ids, output_hidden_states=True)
    theirs = pair.local(ids, output_hidden_states=True)
    close(ours.logits, theirs.logits)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for mine, local in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        close(mine, local)
    close(pair.remote(ids).logits, theirs.logits)


@torch.no_grad()
@pytest.mark.works("Calls: left-padded batches")
def test_padded_logits(pair: Pair) -> None:
    batch = pair.padded()
    ours, theirs = pair.remote(**batch).logits, pair.local(**batch).logits
    real = batch["attention_mask"].bool()
    close(ours[real], theirs[real])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "prompt lookup", "no cache"],
)
@pytest.mark.works("Generation: greedy, beams, prompt lookup, without a cache")
def test_generate(pair: Pair, options: dict[str, Any]) -> None:
    ids = pair.ids(1, 9).repeat(1, 2)
    options = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, **options}
    ours, theirs = pair.remote.generate(ids, **options), pair.local.generate(ids, **options)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.works("Generation: left-padded batches, with scores and hidden states")
def test_generate_padded_batch_with_scores(pair: Pair) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "output_scores": True,
        "output_hidden_states": True,
        "return_dict_in_generate": True,
    }
    batch = pair.padded()
    ours = pair.remote.generate(**batch, **options)
    theirs = pair.local.generate(**batch, **options)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for mine, local in zip(ours.scores, theirs.scores, strict=True):
        close(mine, local)
    close(ours.hidden_states[-1][-1], theirs.hidden_states[-1][-1])


@torch.no_grad()
@pytest.mark.works("Caches: decode in any pieces, rollback (`crop`)")
def test_cached_decode_in_any_pieces(pair: Pair) -> None:
    """Lazily made caches, caches asked for, rollback: logits as from one uncached pass."""
    ids = pair.ids(2, 20)
    whole = pair.local(ids).logits
    for use_cache in (None, True):
        first = pair.remote(ids[:, :8], use_cache=use_cache)
        cache = first.past_key_values
        second = pair.remote(ids[:, 8:9], past_key_values=cache)
        third = pair.remote(ids[:, 9:], past_key_values=cache)
        close(torch.cat([first.logits, second.logits, third.logits], 1), whole)
        cache.crop(-7)
        close(pair.remote(ids[:, 13:], past_key_values=cache).logits, whole[:, 13:])


@pytest.mark.works("Generation: several turns over one cache")
def test_a_second_turn_continues_the_cache(pair: Pair) -> None:
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    ids = pair.ids(1, 7)
    turns = {"max_new_tokens": 5, "min_new_tokens": 5, **options}
    results = []
    for model in (pair.remote, pair.local):
        first = model.generate(ids, **turns)
        longer = torch.cat([first.sequences, pair.ids(1, 4, seed=1)], dim=1)
        second = model.generate(longer, past_key_values=first.past_key_values, **turns)
        results.append(second.sequences.tolist())
    assert results[0] == results[1]


@pytest.mark.works("Generation: sampling draws the same tokens")
def test_sampling_draws_the_same_tokens(pair: Pair) -> None:
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": True, "top_k": 20}
    results = []
    for model in (pair.remote, pair.local):
        torch.manual_seed(7)
        results.append(model.generate(pair.ids(2, 6), num_return_sequences=2, **options).tolist())
    assert results[0] == results[1]
