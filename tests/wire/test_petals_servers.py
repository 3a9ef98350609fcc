"""A notebook on hivemind's own servers, of which Petals' servers consist; Petals is not needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.letter_tokenizer import lettered_model
from support.petals_peer import CACHE_TOKENS, PetalsPeer, petals_swarm
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.tuning import DeepPrompts

HIDDEN, BLOCKS = 48, 5


def states(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def petals(tiny_llama: Path) -> Iterator[tuple[list[str], list[PetalsPeer]]]:
    with petals_swarm(tiny_llama, [(0, 2), (2, BLOCKS)]) as made:
        yield made


@pytest.fixture(scope="module")
def models(tiny_llama: Path, petals: Any) -> Iterator[tuple[Any, Any]]:
    local = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with sn.connect(petals[0], model=tiny_llama) as swarm:
        yield swarm.model, local


def test_room_in_a_cache_is_read_in_tokens(models: tuple[Any, Any]) -> None:
    spans = models[0]._runner.connection.directory.snapshot.spans
    assert [span.cache_left for span in spans] == [CACHE_TOKENS] * 2


@pytest.mark.works("Petals' servers: generation")
def test_a_notebook_generates(models: tuple[Any, Any], petals: Any) -> None:
    remote, local = models
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    for more in ({}, {"num_beams": 3}):
        ours = remote.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)
        theirs = local.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)
        assert ours.tolist() == theirs.tolist()
    assert {"rpc_inference"} <= set(petals[1][0].seen) & set(petals[1][1].seen)


@pytest.mark.works("Petals' servers: logits and gradients")
def test_a_notebook_gets_logits_and_gradients(models: tuple[Any, Any], petals: Any) -> None:
    found = []
    for model in models:
        embeddings = model.get_input_embeddings().weight.detach()
        given = embeddings[torch.arange(3, 13)][None].clone().requires_grad_(True)
        logits = model(inputs_embeds=given).logits
        logits.square().mean().backward()
        found.append((logits.detach(), given.grad))
    close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-7, rtol=1e-4)
    assert {"rpc_forward_stream", "rpc_backward_stream"} <= set(petals[1][1].seen)


@pytest.mark.works("Petals' servers: `output_hidden_states`")
def test_a_notebook_sees_all_states(models: tuple[Any, Any]) -> None:
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = [model(ids, output_hidden_states=True).hidden_states for model in models]
    assert len(ours) == BLOCKS + 1
    for mine, local in zip(ours, theirs, strict=True):
        close(mine, local)


def test_the_logit_lens(models: tuple[Any, Any], tmp_path: Path) -> None:
    ids, tokenizer = torch.arange(5, 12), lettered_model(tmp_path).tokenizer
    ours, theirs = [sn.probing.logit_lens(model, ids, tokenizer=tokenizer) for model in models]
    assert ours.blocks == theirs.blocks == list(range(BLOCKS))
    close(ours.states, theirs.states)
    close(ours.probabilities, theirs.probabilities)


@contextmanager
def writing(model: Any, read: int, written: int) -> Iterator[list[torch.Tensor]]:
    """Hooks that read one block's output and change another's."""
    seen: list[torch.Tensor] = []

    def change(_module: Any, _args: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        return (state * 1.5, *output[1:]) if isinstance(output, tuple) else state * 1.5

    def note(_module: Any, _args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    layers = model.model.layers
    handles = [
        layers[written].register_forward_hook(change),
        layers[read].register_forward_hook(note),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.works("Petals' servers: hooks on blocks")
def test_hooks_read_and_write_while_it_generates(models: tuple[Any, Any]) -> None:
    """First without hooks, then with them over the same cache, then without again."""
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(2))
    found = []
    for model in models:
        with torch.no_grad():
            out = model(ids, use_cache=True)
            logits, cache = [out.logits], out.past_key_values
            for step in range(6):
                following = logits[-1][:, -1:].argmax(-1)
                if 2 <= step < 4:
                    with writing(model, read=3, written=2) as seen:
                        out = model(following, past_key_values=cache)
                    logits.append(seen[0][..., : out.logits.shape[-1]])
                else:
                    out = model(following, past_key_values=cache)
                cache = out.past_key_values
                logits.append(out.logits)
        found.append(logits)
    for mine, local in zip(*found, strict=True):
        close(mine, local)


@pytest.mark.works("Petals' servers: rollback, prompt lookup, other rows of a batch")
def test_what_has_been_computed_is_taken_back(models: tuple[Any, Any]) -> None:
    """Petals' servers count on whatever place they are told: their caches begin anew."""
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(6))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = []
    for model in models:
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            cache.crop(-4)
            again = model(ids[:, 3:6], past_key_values=cache).logits
            cache.batch_select_indices(torch.tensor([1]))
            one = model(ids[1:, 6:], past_key_values=cache).logits
        repeated = torch.cat([ids[:1], ids[:1]], dim=1)
        looked_up = model.generate(repeated, prompt_lookup_num_tokens=3, **options)
        with writing(model, read=3, written=2):
            changed = model.generate(ids, **options)
        found.append((again, one, looked_up.float(), changed.float()))
    for mine, local in zip(*found, strict=True):
        close(mine, local)


def test_gradients_reach_observed_states(models: tuple[Any, Any]) -> None:
    found = []
    for model in models:
        embeddings = model.get_input_embeddings().weight.detach()
        given = embeddings[torch.arange(3, 13)][None].clone().requires_grad_(True)
        with writing(model, read=3, written=0):
            out = model(inputs_embeds=given, output_hidden_states=True)
        for state in out.hidden_states:
            state.retain_grad()
        out.logits.square().mean().backward()
        found.append([given.grad, *(state.grad for state in out.hidden_states)])
    for mine, local in zip(*found, strict=True):
        torch.testing.assert_close(mine, local, atol=1e-7, rtol=1e-4)


@pytest.mark.refused(
    "Petals' servers: hooks on modules inside of blocks", "hook whole blocks, or `swarm.own(block)`"
)
def test_modules_inside_are_refused(models: tuple[Any, Any]) -> None:
    remote, _ = models
    with (
        remote.model.layers[1].mlp.register_forward_hook(lambda *_: None),
        pytest.raises(sn.errors.Unsupported, match=r"modules inside of blocks.*swarm\.own"),
    ):
        remote(torch.tensor([[3, 4, 5]]))


@pytest.mark.refused("Petals' servers: PEFT's adapters", "`swarm.own(block)`")
def test_adapters_are_refused(models: tuple[Any, Any]) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped: Any = peft.get_peft_model(copy.deepcopy(models[0]), config)
    ids = torch.tensor([[3, 4, 5]])
    for use in (wrapped, wrapped.generate):
        with pytest.raises(sn.errors.Unsupported, match=r"runs no adapters.*swarm\.own\(slice"):
            use(input_ids=ids)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows side by side go through the servers as one group."""
    ids = torch.randint(3, 128, (8, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[:3, :3] = mask[4, :6] = mask[6:, 6:] = 0
    return ids, mask


@pytest.mark.works("Petals' servers: padded batches without a cache")
def test_padded_batches_without_a_cache(models: tuple[Any, Any]) -> None:
    """Left and right padding, rows with the same, and one without; also what is observed."""
    ids, mask = padded()
    found = []
    for model in models:
        with torch.no_grad():
            out = model(ids, attention_mask=mask, output_hidden_states=True)
        found.append([state[mask.bool()] for state in (out.logits, *out.hidden_states)])
    for mine, local in zip(*found, strict=True):
        close(mine, local)


@pytest.mark.works("Petals' servers: generation from left-padded batches")
def test_a_padded_batch_generates(models: tuple[Any, Any]) -> None:
    """Rows with the same padding together; greedy, with beams, with states, over several turns."""
    ids, _ = padded()
    ids, mask = ids[:4], torch.ones_like(ids[:4])
    mask[1, :3] = mask[2, :6] = mask[3, :3] = 0
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    shown = {"return_dict_in_generate": True, "output_logits": True}
    for more in ({"output_hidden_states": True}, {"num_beams": 3}):
        ours, theirs = (
            model.generate(ids, attention_mask=mask, **fixed, **shown, **more) for model in models
        )
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        for mine, other in zip(ours.logits, theirs.logits, strict=True):
            close(mine, other)
        for mine, other in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
            if "num_beams" not in more and mine[0].shape[1] == 1:
                close(torch.stack(mine), torch.stack(other))
    found = []
    for model in models:
        texts, seen, cache = ids, mask, None
        for _ in range(2):
            options = {"past_key_values": cache, "attention_mask": seen, **fixed, **shown}
            answer = model.generate(texts, **options)
            cache = answer.past_key_values
            texts = torch.cat([answer.sequences, ids[:, :2]], dim=1)
            seen = torch.cat([mask, mask.new_ones(4, texts.shape[1] - mask.shape[1])], dim=1)
        found.append(texts.tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("wrong", ["mask", "positions"])
def test_padding_in_the_middle_of_a_cache_is_refused(models: Any, wrong: str) -> None:
    remote, (ids, mask) = models[0], padded()
    ids, mask = ids[:4], mask[:4]
    with torch.no_grad():
        options = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0), "use_cache": True}
        cache = remote(ids, attention_mask=mask, **options).past_key_values
        longer = torch.cat([mask, mask[:, -2:]], dim=1)
        if wrong == "mask":
            longer[2, -2] = 0
        ids_behind = (longer.cumsum(-1) - 1)[:, -2:] + (wrong == "positions")
        with pytest.raises(sn.errors.Unsupported, match=r"use_cache=False"):
            remote(
                ids[:, :2], attention_mask=longer, position_ids=ids_behind, past_key_values=cache
            )


def test_gradients_of_padded_batches(models: tuple[Any, Any]) -> None:
    ids, mask = padded()
    found = []
    for model in models:
        given = model.get_input_embeddings()(ids).detach().clone().requires_grad_(True)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = model(inputs_embeds=given, attention_mask=mask, position_ids=positions).logits
        logits[mask.bool()].square().mean().backward()
        found.append(given.grad[mask.bool()])
    torch.testing.assert_close(*found, atol=1e-7, rtol=1e-4)


def test_deep_prompts_in_padded_batches(models: tuple[Any, Any]) -> None:
    remote, local = models
    ids, mask = padded()
    prompts = DeepPrompts(remote, length=5)
    vectors = torch.randn(BLOCKS, 5, HIDDEN, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        prompts.prompts.copy_(vectors)
    try:
        mine = remote(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        mine.square().mean().backward()
    finally:
        prompts.remove()
    wanted = vectors.requires_grad_(True)

    def add(index: int) -> Any:
        def hook(_module: Any, args: Any) -> Any:
            missing = ids.shape[1] - wanted.shape[1]
            return (args[0] + torch.nn.functional.pad(wanted[index], (0, 0, 0, missing)),)

        return local.model.layers[index].register_forward_pre_hook(hook)

    handles = [add(index) for index in range(BLOCKS)]
    theirs = local(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    theirs.square().mean().backward()
    for handle in handles:
        handle.remove()
    close(mine.detach(), theirs.detach())
    torch.testing.assert_close(prompts.prompts.grad, wanted.grad, atol=1e-7, rtol=1e-3)


@pytest.mark.refused("Petals' servers: padding between tokens", "servers of `swarm-notebook serve`")
def test_padding_between_tokens_is_refused(models: tuple[Any, Any]) -> None:
    mask = torch.tensor([[1, 1, 0, 1]])
    with pytest.raises(sn.errors.Unsupported, match="row 0 has padding"):
        models[0](torch.tensor([[3, 4, 5, 6]]), attention_mask=mask)


def continued(model: Any, cache: Any, length: int) -> torch.Tensor:
    """Logits of three calls over one cache, of `length` tokens together."""
    ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(5))
    found = []
    with torch.no_grad():
        for part in ids.tensor_split(3, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("most", [1 << 14, 40])
def test_more_tokens_than_were_reserved(models: Any, petals: Any, most: int) -> None:
    """12 tokens are reserved, then twice as many, then what there is."""
    remote, local = models
    cache = remote.new_cache(max_length=12)
    before = [len(peer.reserved) for peer in petals[1]]
    for peer in petals[1]:
        peer.most = most
    try:
        close(continued(remote, cache, 36), continued(local, None, 36))
        for peer, count in zip(petals[1], before, strict=True):
            assert peer.reserved[count:] == [12, 24, min(48, most)]
        assert cache.session.failovers == 0
    finally:
        for peer in petals[1]:
            peer.most = 1 << 14


def test_more_tokens_than_a_server_has_room_for(models: Any, petals: Any) -> None:
    """It is refused, in the server's words; the server is none the worse for it."""
    remote, _ = models
    petals[1][1].most = 30
    try:
        with pytest.raises(sn.errors.CacheFull, match="Cannot allocate KV cache for"):
            continued(remote, remote.new_cache(max_length=12), 36)
        directory = remote._runner.connection.directory
        assert not any(directory.avoided(span.peer) for span in directory.snapshot.spans)
        continued(remote, None, 18)
    finally:
        petals[1][1].most = 1 << 14


@pytest.mark.parametrize(
    "text",
    [
        "Maximum length exceeded: prefix 12 + current 1 exceeds pre-allocated maximum 12",
        "Cannot allocate KV cache for 4096 tokens, max = 2048",
        "Could not allocate 4096 bytes, max cache size = 2048 bytes",
        "Server's attention cache is full, failed to allocate 4096 bytes in 10.0 seconds",
    ],
)
def test_petals_words_for_no_room(text: str) -> None:
    assert isinstance(sn.errors.from_wire(text, "peer"), sn.errors.CacheFull)
    assert isinstance(sn.errors.from_wire(f"boom: {text}", "peer"), sn.errors.ServerFailed)
