"""Positions beyond and beside the plain count, equal to the local model's.

Rotary embeddings that depend on the length (``dynamic``, ``longrope``) or go beyond it (YaRN), and
position ids that jump or begin again, in all ways in which a model is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pairs import TOLERANCE, Pair, pair_of
from support.scene import Scene
from support.tiny import tiny_model

from swarm_notebook.errors import Unsupported

ORIGINAL = 32  # positions that the models below were "made for"
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"factor": 4.0}),
    "yarn": ("llama", {"factor": 2.0, "original_max_position_embeddings": ORIGINAL // 2}),
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": ORIGINAL,
            "short_factor": [1.0] * 6,
            "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
            "factor": 4.0,
        },
    ),
}


def same(pair: Pair, use: Callable[[Any], torch.Tensor]) -> None:
    torch.testing.assert_close(use(pair.remote), use(pair.local), atol=TOLERANCE, rtol=1e-4)


@pytest.fixture(scope="module", params=sorted(ROPES))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    family, rope = ROPES[request.param]
    parameters = {"rope_type": request.param, "rope_theta": 10000.0, **rope}
    folder: Path = tiny_model(
        family,
        tmp_path_factory.mktemp("models"),
        rope_parameters=parameters,
        max_position_embeddings=ORIGINAL,
        original_max_position_embeddings=ORIGINAL,
        sliding_window=None,
    )
    with pair_of(folder) as made:
        yield made


@torch.no_grad()
@pytest.mark.works(
    "Positions: rotary embeddings that depend on the length (`dynamic`, `longrope`), YaRN beyond it"
)
def test_lengths_around_the_original_one(pair: Pair) -> None:
    """Each call leaves behind what the next one begins with, as on the local model."""
    ids = pair.ids(3, 3 * ORIGINAL)
    for length in (ORIGINAL, 3 * ORIGINAL, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL, 5, ORIGINAL):
        for use_cache in (True, False):
            same(pair, lambda model, n=length, c=use_cache: model(ids[:, :n], use_cache=c).logits)


@torch.no_grad()
def test_a_prompt_in_parts(pair: Pair) -> None:
    """It is cut by the notebook and by the servers, and turns by the whole."""
    ids = pair.ids(1, 20 * ORIGINAL)
    same(pair, lambda model: model(ids, use_cache=True).logits)
    same(pair, lambda model: model(ids[:, : ORIGINAL - 2]).logits)  # and nothing is left of it


@torch.no_grad()
def test_decode_across_the_original_length(pair: Pair) -> None:
    ids, begin = pair.ids(2, ORIGINAL + 6), ORIGINAL - 4

    def step_by_step(model: Any) -> torch.Tensor:
        output = model(ids[:, :begin], use_cache=True)
        logits = [output.logits]
        for token in range(begin, ids.shape[1]):
            output = model(ids[:, token : token + 1], past_key_values=output.past_key_values)
            logits.append(output.logits)
            model(pair.ids(1, 2 * ORIGINAL if token == ORIGINAL else 7), use_cache=False)
        return torch.cat(logits, dim=1)

    same(pair, step_by_step)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    same(pair, lambda model: model.generate(ids[:, :begin], **options))
    same(pair, lambda model: model.generate(ids[:, :begin], num_beams=2, **options))


@torch.no_grad()
def test_a_cache_that_is_built_again_turns_as_it_did(pair: Pair) -> None:
    ids = pair.ids(1, 2 * ORIGINAL)

    def interrupted(model: Any, leave: bool) -> torch.Tensor:
        cache = model(ids[:, : ORIGINAL - 2], use_cache=True).past_key_values
        for token in range(ORIGINAL - 2, ORIGINAL + 3):
            model(ids[:, token : token + 1], past_key_values=cache)
        if leave:
            cache.leave()
        twin = copy.deepcopy(cache)
        rest = ids[:, ORIGINAL + 3 :]
        outputs = [model(rest, past_key_values=which).logits for which in (cache, twin)]
        return torch.cat(outputs)

    ours, theirs = interrupted(pair.remote, True), interrupted(pair.local, False)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [ORIGINAL // 2, 2 * ORIGINAL])
def test_gradients_of_inputs(pair: Pair, length: int) -> None:
    def gradient(model: Any) -> torch.Tensor:
        embedded = model.get_input_embeddings()(pair.ids(4, length)).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().mean().backward()
        return embedded.grad

    same(pair, gradient)


PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
JUMPING = torch.tensor([[0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15]])


def _logits(stage: Scene, ids: torch.Tensor, **options: Any) -> None:
    tokens = stage.ids(2, ids.shape[1])
    ours, theirs = (
        model(tokens, position_ids=ids, **options).logits
        for model in (stage.remote, stage.reference)
    )
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("ids", [PACKED, JUMPING], ids=["packed", "jumping"])
@pytest.mark.works("Positions: `position_ids` that jump, packed sequences")
def test_positions_that_jump_or_begin_again(tiny_scene: Scene, ids: torch.Tensor) -> None:
    """Sequences in one row are told apart without a cache and a mask only, as transformers does."""
    ones = torch.ones(2, ids.shape[1], dtype=torch.long)
    for options in ({}, {"use_cache": True}, {"use_cache": False}):
        _logits(tiny_scene, ids, **options)
        _logits(tiny_scene, ids.expand(2, -1), attention_mask=ones, **options)


@torch.no_grad()
def test_a_cache_filled_at_positions_that_begin_again(tiny_scene: Scene) -> None:
    tokens = tiny_scene.ids(2, 12)
    for options in ({}, {"use_cache": True}):
        found = []
        for model in (tiny_scene.remote, tiny_scene.reference):
            first = model(tokens[:, :7], position_ids=PACKED[:, :7], **options)
            cache = first.past_key_values
            second = model(tokens[:, 7:], position_ids=PACKED[:, 7:], past_key_values=cache)
            found.append(torch.cat([first.logits, second.logits], dim=1))
        torch.testing.assert_close(*found, atol=TOLERANCE, rtol=0)


def test_gradients_of_packed_sequences(tiny_scene: Scene) -> None:
    tokens = tiny_scene.ids(2, 12)
    for options in ({}, {"use_cache": False}):
        found = []
        for model in (tiny_scene.remote, tiny_scene.reference):
            embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
            model(inputs_embeds=embedded, position_ids=PACKED, **options).logits.sum().backward()
            found.append(embedded.grad)
        torch.testing.assert_close(*found, atol=TOLERANCE, rtol=1e-4)


@torch.no_grad()
@pytest.mark.works("Positions: a block called by itself with `position_embeddings`")
def test_a_block_by_itself_is_where_its_embeddings_say(tiny_scene: Scene) -> None:
    hidden = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    where = torch.tensor([[1, 6, 2, 3, 9]])

    def alone(model: Any, **options: Any) -> torch.Tensor:
        embeddings = model.model.rotary_emb(hidden, where)
        return model.model.layers[1](hidden, position_embeddings=embeddings, **options)

    for options in ({}, {"position_ids": torch.arange(5)[None]}, {"use_cache": False}):
        found = [alone(model, **options) for model in (tiny_scene.remote, tiny_scene.reference)]
        torch.testing.assert_close(*found, atol=TOLERANCE, rtol=0)
    block = tiny_scene.remote.model.layers[1]
    cosines, sines = tiny_scene.remote.model.rotary_emb(hidden, where)
    for strange in ((cosines * 0.5, sines), (cosines.add_(1), sines)):
        with pytest.raises(Unsupported, match=r"did not make; .* swarm\.own\(1\)"):
            block(hidden, position_embeddings=strange)
    with pytest.raises(Unsupported, match="by itself with attention_mask"):
        block(hidden, torch.ones(2, 5))
