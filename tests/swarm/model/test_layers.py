"""The list of blocks belongs to the user: cut, thinned, repeated, wrapped, left early."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.pairs import Pair
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from swarm_notebook.errors import Unsupported

BLOCKS = 5


@pytest.fixture(params=["remote", "with one at home"])
def models(pair: Pair, request: pytest.FixtureRequest) -> list[Any]:
    pair.swarm.release()
    if request.param != "remote":
        pair.swarm.own(1)
    return pair.models()


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, 128, (rows, length), generator=generator)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # A server multiplies as was faster when it was tried: 25 roundings of what is large may differ.
    size = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, atol=max(1e-5, 3e-6 * size), rtol=0)


def same_text(models: list[Any], *, first_runs: bool = True, **options: Any) -> None:
    """Both generate the same.

    Args:
        first_runs: whether block 0 does; transformers' own cache counts by its keys, and a local
            model without it generates wrongly, except without a cache.
    """
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    batch["attention_mask"][1, :4] = 0
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    ours = models[0].generate(**batch, **options)
    if not first_runs:
        options["use_cache"] = False
    theirs = models[1].generate(**batch, **options)
    assert ours.tolist() == theirs.tolist()


def same_passes(models: list[Any]) -> None:
    with torch.no_grad():
        ours, theirs = (model(tokens(), output_hidden_states=True) for model in models)
        close(ours.logits, theirs.logits)
        for mine, local in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            close(mine, local)
    found = []
    for model in models:
        embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=False).logits.logsumexp(-1).sum().backward()
        found.append(embedded.grad)
    close(*found)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 3, 4], [2, 3], [1, 4]], ids=str)
@pytest.mark.works("The list of blocks: blocks dropped")
def test_a_list_with_fewer_blocks(models: list[Any], order: list[int]) -> None:
    for model in models:
        model.model.layers = nn.ModuleList([model.model.layers[index] for index in order])
    same_passes(models)
    same_text(models, first_runs=order[0] == 0)
    same_text(models, first_runs=order[0] == 0, num_beams=2)


@pytest.mark.works("The list of blocks: cut (`layers = layers[:n]`), with a cache, too")
def test_a_cut_list(models: list[Any]) -> None:
    for model in models:
        model.model.layers = model.model.layers[:3]
    same_passes(models)
    same_text(models)


@pytest.mark.parametrize("order", [[0, 1, 1, 2, 3, 4], [0, 2, 1, 3, 4]], ids=str)
@pytest.mark.works("The list of blocks: repeated or exchanged, with `use_cache=False`")
def test_a_list_in_another_order(models: list[Any], order: list[int]) -> None:
    """It works without a cache, in which each block has one place."""
    for model in models:
        model.model.layers = nn.ModuleList([model.model.layers[index] for index in order])
        model.config.num_hidden_layers = len(order)
    with torch.no_grad():
        ours, theirs = (model(tokens(), use_cache=False).logits for model in models)
        close(ours, theirs)
        close(models[0](tokens()).logits, theirs)  # nobody asked for its cache
    same_text(models, use_cache=False)
    with pytest.raises(Unsupported, match=r"repeats or exchanges blocks.*use_cache=False"):
        models[0].generate(tokens(), max_new_tokens=2)


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        assert hidden.isfinite().all()
        return 0.5 * self.inner(2 * hidden, **kwargs)


class Same(nn.Module):
    def forward(self, hidden: torch.Tensor, **_kwargs: Any) -> torch.Tensor:
        return hidden


class Mine(nn.Module):
    def forward(self, hidden: torch.Tensor, **_kwargs: Any) -> torch.Tensor:
        assert hidden.isfinite().all()
        return hidden.roll(1, -1)


@pytest.mark.parametrize("place", [0, 1, 2, 4])
@pytest.mark.works("The list of blocks: wrapped (`layers[i] = Wrapper(layers[i])`)")
def test_a_wrapped_block(models: list[Any], place: int) -> None:
    for model in models:
        model.model.layers[place] = Doubled(model.model.layers[place])
    same_passes(models)
    same_text(models)


@pytest.mark.parametrize("kind", [Mine, Same])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_module_in_the_place_of_a_block(models: list[Any], place: int, kind: type) -> None:
    for model in models:
        model.model.layers[place] = kind()
    same_passes(models)
    same_text(models, first_runs=place > 0)


def test_the_list_is_whole_for_all_but_the_decoder(models: list[Any]) -> None:
    """The decoder may see one block that stands for all; a hook that looks meanwhile may not."""
    seen = []
    for model in models:
        blocks = model.model.layers

        def look(*_: Any, blocks: Any = blocks) -> None:
            seen.append((len(list(blocks)), len(blocks[1:]), len(blocks), blocks[-1] is blocks[3]))

        model.model.embed_tokens.register_forward_hook(look)
    same_text(models)
    assert len(set(seen)) == 1


@pytest.mark.works("Generation: early exit (`assistant_early_exit`)")
def test_leaving_early_to_guess(models: list[Any]) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "assistant_early_exit": 3}
    ours, theirs = (model.generate(tokens(1), **options) for model in models)
    assert ours.tolist() == theirs.tolist()
    sampled = models[0].generate(tokens(1), **{**options, "do_sample": True})
    assert sampled.shape[1] > 9


def test_a_smaller_number_of_blocks_in_the_config(models: list[Any]) -> None:
    models[0].config.num_hidden_layers = 3
    models[1].model.layers = models[1].model.layers[:3]
    with torch.no_grad():
        close(models[0](tokens()).logits, models[1](tokens()).logits)


@pytest.mark.refused(
    "The list of blocks: a forward of your own that stops early",
    "cut the list: `layers = layers[:n]`",
)
def test_a_model_that_stops_by_itself(pair: Pair) -> None:
    """That it will is not known before: refused, and no blank comes out."""
    pair.swarm.release()
    remote: Any = copy.deepcopy(pair.remote)

    def forward(input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = remote.model.embed_tokens(input_ids)
        for block in remote.model.layers[:3]:
            hidden = block(hidden)
        return hidden

    remote.model.forward = forward
    with pytest.raises(Unsupported, match=r"stopped behind block 2.*cut the list"):
        remote.model(input_ids=tokens(), use_cache=False)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.works("Gradients: `gradient_checkpointing_enable`")
def test_checkpointing_by_transformers(models: list[Any], reentrant: bool) -> None:
    found = []
    for model in models:
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.train()
        embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.logsumexp(-1).sum().backward()
        found.append(embedded.grad)
    close(*found)


@pytest.mark.refused(
    "Gradients: re-entrant checkpoints around a remote block",
    "`use_reentrant=False`, or `swarm.own(block)`",
)
def test_checkpointing_by_hand_says_what_to_do(pair: Pair) -> None:
    pair.swarm.release()
    model: Any = copy.deepcopy(pair.remote)
    for block in model.model.layers:
        forward = block.forward
        block.forward = lambda hidden, forward=forward, **kwargs: checkpoint(
            forward, hidden, use_reentrant=False, **kwargs
        )
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.isfinite().all()


@pytest.mark.works("Caches: `len`, `layers`, `get_seq_length`, `is_initialized`")
def test_a_cache_reads_as_transformers_does(models: list[Any]) -> None:
    with torch.no_grad():
        ours, theirs = (model(tokens()).past_key_values for model in models)
        assert isinstance(theirs, DynamicCache)
        for ask in (bool, len, lambda one: one.get_seq_length(), lambda one: one.is_initialized):
            assert ask(ours) == ask(theirs)
        assert ours.get_max_length() == theirs.get_max_length()
        assert ours.is_compileable == theirs.is_compileable
        assert ours.is_sliding == theirs.is_sliding
        lengths = [layer.get_seq_length() for layer in theirs.layers]
        assert [layer.get_seq_length() for layer in ours.layers] == lengths
        empty = models[0].new_cache()
        assert len(empty) == BLOCKS
        assert not empty.is_initialized
        layer = models[0](tokens()).past_key_values.layers[0]  # whose cache is gone
        assert layer.get_seq_length() == theirs.get_seq_length()
        for read in (lambda: ours.layers[0].keys, lambda: list(ours), lambda: layer.keys.shape):
            with pytest.raises(Unsupported, match="kept by their servers"):
                read()
        ours.batch_select_indices([1])
        assert ours.batch_size == 1


@pytest.mark.works("Caches: `copy.deepcopy`")
def test_a_copied_cache_goes_its_own_way(models: list[Any]) -> None:
    ids, more = tokens(), tokens(2, 3)
    with torch.no_grad():
        cache = models[0](ids, use_cache=True).past_key_values
        models[0](more, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        other = copy.deepcopy(cache)
        assert len(other) == len(cache)
        assert other.get_seq_length() == 12
        seen = torch.cat([ids, more], dim=1)[[1, 0]]
        for cached, extra in ((cache, 5), (other, 2), (cache, 3)):
            new = tokens(2, extra)
            ours = models[0](new, past_key_values=cached).logits
            before = seen if cached.get_seq_length() == 12 + extra else None
            if before is not None:
                close(ours, models[1](torch.cat([before, new], dim=1)).logits[:, 12:])
        assert (cache.get_seq_length(), other.get_seq_length()) == (20, 14)


def served(pair: Pair) -> int:
    """Tokens that the servers have computed, each for itself."""
    rows = pair.swarm.status(refresh=False).servers
    return sum(pair.swarm.info(str(row.peer_id))["tokens_served"] for row in rows)


@torch.no_grad()
@pytest.mark.works(
    "Caches: `copy.deepcopy` of a prompt's, on the servers, without a second prefill"
)
def test_a_copied_prompt_is_not_computed_again(pair: Pair) -> None:
    """As transformers' documentation reuses a prompt."""
    pair.swarm.release()
    remote, local = pair.models()
    prompt, ends = tokens(2, 40), [tokens(2, 3), tokens(2, 5) + 1, tokens(2, 2)]
    cache = remote(prompt, use_cache=True).past_key_values
    for end in ends:
        before = served(pair)
        whole = torch.cat([prompt, end], dim=1)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        mask = torch.ones_like(whole)
        ours = remote.generate(
            whole, attention_mask=mask, past_key_values=copy.deepcopy(cache), **options
        )
        assert ours.tolist() == local.generate(whole, attention_mask=mask, **options).tolist()
        assert served(pair) - before == 2 * 2 * (end.shape[1] + 3)
    assert cache.get_seq_length() == 40


def longer(model: Any, cache: Any) -> None:
    model(tokens(2, 3), past_key_values=cache)


def shorter(model: Any, cache: Any) -> None:
    cache.crop(-5)
    model(tokens(2, 7) + 1, past_key_values=cache)


def exchanged(model: Any, cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))
    model(tokens(2, 1), past_key_values=cache)


def left(_model: Any, cache: Any) -> None:
    cache.leave()


@torch.no_grad()
@pytest.mark.parametrize("change", [longer, shorter, exchanged, left])
@pytest.mark.parametrize("twice", [False, True])
def test_what_becomes_of_the_first_one_leaves_its_copy_alone(
    models: list[Any], change: Any, twice: bool
) -> None:
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    cache = models[0](ids, attention_mask=mask, use_cache=True).past_key_values
    models[0](tokens(2, 1), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))  # what the servers do with the next step
    other = copy.deepcopy(cache)
    other = copy.deepcopy(other) if twice else other
    change(models[0], cache)
    seen = torch.cat([ids, tokens(2, 1)], dim=1)[[1, 1]]
    seen_mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)[[1, 1]]
    for length in (2, 3):
        new = tokens(2, length) + length
        seen = torch.cat([seen, new], dim=1)
        seen_mask = torch.cat([seen_mask, torch.ones_like(new)], dim=1)
        theirs = models[1](seen, attention_mask=seen_mask).logits[:, -length:]
        close(models[0](new, past_key_values=other).logits, theirs)
