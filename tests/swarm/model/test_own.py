"""Blocks at home: everything that torch can do to a module gives what it gives on a local model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from support.hosting import HostedSwarm
from support.pairs import Pair, local_model, padded, pair_of
from support.tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.errors import BlocksOutOfRange, MissingBlocks, Unsupported
from swarm_notebook.model.blocks.placeholders import is_placeholder
from swarm_notebook.tuning import DeepPrompts

TOLERANCE = 1e-5
BLOCKS = 5
PLACES: list[Any] = [0, BLOCKS - 1, 3, [3, 4], [0, 1, 2], [1, 3], slice(None)]


@pytest.fixture
def pair(fresh_pair: Pair) -> Pair:
    return fresh_pair


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (rows, length), generator=generator)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def same(pair: Pair) -> None:
    """Logits and states of a padded batch, and a text."""
    batch = padded(tokens(3, 12))
    ours = pair.remote(**batch, output_hidden_states=True)
    theirs = pair.local(**batch, output_hidden_states=True)
    shown = batch["attention_mask"].bool()
    for mine, local in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        close(mine[shown], local[shown])
    close(ours.logits[shown], theirs.logits[shown])
    same_text(pair, batch)


def same_everywhere(pair: Pair) -> None:
    """`same`, in further ways to generate."""
    same(pair)
    same_text(pair, padded(tokens(3, 12)), num_beams=3, num_return_sequences=2)
    same_text(pair, {"input_ids": tokens(1, 12)}, prompt_lookup_num_tokens=3)


def same_text(pair: Pair, batch: dict[str, torch.Tensor], **options: Any) -> None:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    ours = pair.remote.generate(**batch, **options)
    assert ours.tolist() == pair.local.generate(**batch, **options).tolist()


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_block_at_home_computes_what_it_computes_elsewhere(pair: Pair, place: Any) -> None:
    pair.swarm.own(place)
    listed = list(range(BLOCKS))[place] if isinstance(place, (int, slice)) else place
    assert list(pair.swarm.owned) == ([listed] if isinstance(listed, int) else listed)
    same_everywhere(pair)


def test_which_blocks(pair: Pair) -> None:
    own, swarm = pair.swarm.own, pair.swarm
    own([0, -1])
    own(range(1, 2))
    assert swarm.owned == (0, 1, 4)
    own(0)  # is there already
    swarm.release(-1)
    swarm.release([2, 3])  # was not there
    assert swarm.owned == (0, 1)
    swarm.release()
    assert swarm.owned == ()
    for wrong in (5, [-6], slice(5, 9)):
        with pytest.raises(BlocksOutOfRange, match="5 blocks, 0 to 4"):
            own(wrong)
    for kind in (True, "3", 1.5, ["3"], None):
        with pytest.raises(TypeError, match="give a block"):
            own(kind)
    assert swarm.owned == ()
    same(pair)


def test_its_weights_come_and_go(pair: Pair) -> None:
    block = pair.remote.model.layers[3]
    parameters = dict(block.named_parameters())
    pair.swarm.own(3)
    assert repr(block).startswith("OwnLlamaDecoderLayer(")
    assert isinstance(block, type(pair.local.model.layers[3]))
    for name, parameter in pair.local.model.layers[3].named_parameters():
        assert torch.equal(parameters[name], parameter)
        assert not parameters[name].requires_grad
    pair.swarm.release(3)
    assert all(is_placeholder(p) for p in block.parameters() if p.numel() > 1)
    assert repr(block).startswith("RemoteLlamaDecoderLayer(")


def test_a_block_goes_while_its_gradients_are_still_to_come(pair: Pair) -> None:
    """A loss of before goes on with the weights that it was computed with; an optimizer's too."""
    embedded = pair.local.get_input_embeddings()(tokens()).detach()
    weight = pair.remote.model.layers[3].mlp.up_proj.weight
    optimizer = torch.optim.SGD([weight], lr=0.1)
    pair.swarm.own(3)
    gradients = []
    for model in (pair.local, pair.remote):
        model.model.layers[3].mlp.up_proj.weight.requires_grad_(True)
        start = embedded.clone().requires_grad_()
        loss = model(inputs_embeds=start).logits.logsumexp(-1).sum()
        if model is pair.remote:
            pair.swarm.release(3)
            same(pair)
        loss.backward()
        gradients.append(start.grad)
    close(*gradients)
    assert is_placeholder(weight)
    assert weight.grad is None
    pair.swarm.own(3)
    assert optimizer.param_groups[0]["params"][0] is pair.remote.model.layers[3].mlp.up_proj.weight
    same(pair)


@pytest.mark.works("Blocks at home: a mask of pairs of tokens (4D), with all of them")
@torch.no_grad()
def test_a_mask_of_pairs_of_tokens(pair: Pair) -> None:
    """Two texts packed in each row, neither of which sees the other; then a token of the second."""
    pair.swarm.own(slice(None))
    ids, following = tokens(2, 6), tokens(2, 1, seed=1)
    sees = torch.ones(7, 7, dtype=torch.bool).tril()
    sees[3:, :3] = False
    mask = sees.expand(2, 1, 7, 7)
    ours, theirs = (
        model(ids, attention_mask=mask[..., :6, :6], use_cache=True)
        for model in (pair.remote, pair.local)
    )
    close(ours.logits, theirs.logits)
    ours, theirs = (
        model(following, attention_mask=mask[..., 6:, :], past_key_values=before.past_key_values)
        for model, before in ((pair.remote, ours), (pair.local, theirs))
    )
    close(ours.logits, theirs.logits)
    pair.swarm.release()
    with pytest.raises(Unsupported, match="give each text a row of its own"):
        pair.remote(ids, attention_mask=mask[..., :6, :6])


def test_it_needs_no_server(tiny_llama: Path) -> None:
    with (
        HostedSwarm(tiny_llama, [(0, 2), (3, BLOCKS)]) as hosted,
        sn.connect(hosted.initial_peers, model=tiny_llama, own=2) as swarm,
    ):
        pair = Pair(swarm, tiny_llama)
        same(pair)
        status, route = swarm.status(), swarm.route()
        assert status.home == (2,)
        assert not status.missing
        assert "2 servers online, block 2 in this notebook, the others served" in repr(status)
        assert [hop.blocks for hop in route.hops] == ["0:2", "2:3", "3:5"]
        assert "-> this notebook [2:3] ->" in repr(route)
        assert swarm.preview(prompt_tokens=5, max_new_tokens=3).requests == 6
        swarm.release()
        assert swarm.status().missing == [2]
        swarm.connection.directory.patience = 0.5
        with pytest.raises(MissingBlocks, match="block 2"):
            swarm.model(tokens())


# What is done to a block, and on which model: the same function works on both.


def zero_a_head(model: Any) -> None:
    def hook(_module: nn.Module, args: tuple) -> tuple:
        changed = args[0].clone()
        changed[..., 16:32] = 0
        return (changed,)

    model.model.layers[3].self_attn.o_proj.register_forward_pre_hook(hook)


def double_an_output(model: Any) -> None:
    model.model.layers[3].mlp.register_forward_hook(lambda _m, _i, output: 2 * output)


def replace_the_mlp(model: Any) -> None:
    torch.manual_seed(3)
    model.model.layers[3].mlp = nn.Sequential(nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 48))


def patch_a_forward(model: Any) -> None:
    attention = model.model.layers[3].self_attn
    forward = attention.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        output, weights = forward(*args, **kwargs)
        return output.roll(1, -1), weights

    attention.forward = patched


def exchange_an_activation(model: Any) -> None:
    model.model.layers[3].mlp.act_fn = nn.ReLU()


def edit_a_weight(model: Any) -> None:
    weight = model.model.layers[3].mlp.down_proj.weight
    with torch.no_grad():
        weight.add_(torch.outer(torch.linspace(-1, 1, 48), torch.linspace(0, 1, 80)))
    model.model.layers[3].self_attn.v_proj.weight.data *= 1.5


def wrap_a_projection(model: Any) -> None:
    class Mine(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 0.1

    attention = model.model.layers[3].self_attn
    attention.q_proj = Mine(attention.q_proj)


def load_a_state(model: Any) -> None:
    state = {"model.layers.3.mlp.up_proj.weight": torch.linspace(-1, 1, 3840).view(80, 48)}
    assert not model.load_state_dict(state, strict=False).unexpected_keys


def patch_the_block(model: Any) -> None:
    block = model.model.layers[3]
    forward = block.forward
    block.forward = lambda hidden, **kwargs: 0.5 * forward(hidden, **kwargs)


def hook_the_block(model: Any) -> None:
    block = model.model.layers[3]
    block.register_forward_pre_hook(lambda _m, args: (args[0] + 0.1,))
    block.register_forward_hook(lambda _m, _args, output: output * 0.9)


CHANGES: list[Callable[[Any], None]] = [
    zero_a_head,
    double_an_output,
    replace_the_mlp,
    patch_a_forward,
    exchange_an_activation,
    edit_a_weight,
    wrap_a_projection,
    load_a_state,
    patch_the_block,
    hook_the_block,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
@pytest.mark.works(
    "Blocks at home: hooks that write, replaced modules, edited weights, patched heads"
)
def test_what_is_done_to_it_takes_effect(pair: Pair, change: Callable[[Any], None]) -> None:
    plain = pair.local(tokens()).logits
    pair.swarm.own(3)
    for model in (pair.remote, pair.local):
        change(model)
    assert (pair.local(tokens()).logits - plain).abs().max() > 1e-3
    same(pair)


@pytest.mark.works("Blocks at home: gradients at inner modules")
def test_gradients_at_inner_modules(pair: Pair) -> None:
    pair.swarm.own([1, 3])
    found = []
    for model in (pair.remote, pair.local):
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str, seen: dict[str, torch.Tensor] = seen) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
                output.requires_grad_() if not output.requires_grad else None
                output.retain_grad()
                seen[name] = output

            return hook

        for index in (1, 3):
            model.model.layers[index].mlp.up_proj.register_forward_hook(keep(f"up {index}"))
            model.model.layers[index].self_attn.v_proj.register_forward_hook(keep(f"v {index}"))
        embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.logsumexp(-1).sum().backward()
        found.append({name: one.grad for name, one in seen.items()} | {"in": embedded.grad})
    for name, gradient in found[1].items():
        close(found[0][name], gradient)


@pytest.mark.parametrize("place", [[0], [3], [2, 3], [0, 4]], ids=str)
@pytest.mark.works("Blocks at home: full fine-tuning")
def test_full_fine_tuning(pair: Pair, place: list[int]) -> None:
    pair.swarm.own(place)
    losses: list[list[float]] = []
    for model in (pair.remote, pair.local):
        model.train()
        parameters = [p for index in place for p in model.model.layers[index].parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        losses.append([])
        for step in range(3):
            optimizer.zero_grad()
            loss = model(tokens(2, 9, step), labels=tokens(2, 9, step)).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        model.eval()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for index in place:
        theirs = dict(pair.local.model.layers[index].named_parameters())
        for name, parameter in pair.remote.model.layers[index].named_parameters():
            close(parameter, theirs[name])
    same(pair)


def test_dropout_inside_is_torchs_own(pair: Pair) -> None:
    """In training mode an own block draws as the local one does."""
    pair.swarm.own(4)
    losses = []
    for model in (pair.remote, pair.local):
        model.train()
        model.model.layers[4].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
        torch.manual_seed(7)
        losses.append(model(tokens()).logits)
        model.eval()
    close(*losses)
    same(pair)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(pair: Pair, reentrant: bool) -> None:
    """Remote blocks do without; a block at home has it, with deep prompts in front of it."""
    pair.swarm.own([1, 2])
    found = []
    embedded = pair.local.get_input_embeddings()(tokens()).detach()
    prompts = DeepPrompts(pair.remote, 4, std=0.5)
    values = prompts.prompts.detach()
    for model in (pair.remote, pair.local):
        if model is pair.local:
            for index, block in enumerate(model.model.layers):
                block.register_forward_pre_hook(_prompt(values[index]))
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.train()
        model.model.layers[1].requires_grad_(True)
        start = embedded.clone().requires_grad_()
        model(inputs_embeds=start).logits.logsumexp(-1).sum().backward()
        found.append([start.grad, *(p.grad for p in model.model.layers[1].parameters())])
        model.gradient_checkpointing_disable()
        model.eval()
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)
    assert prompts.prompts.grad is not None
    prompts.remove()


def _prompt(values: torch.Tensor) -> Callable[[nn.Module, tuple], tuple]:
    def hook(_module: nn.Module, args: tuple) -> tuple:
        changed = args[0].clone()
        changed[:, : len(values)] += values[: changed.shape[1]]
        return (changed, *args[1:])

    return hook


@pytest.mark.parametrize("place", [[0], [2], [4], [0, 1, 2, 3, 4]], ids=str)
def test_deep_prompts(pair: Pair, place: list[int]) -> None:
    prompts = DeepPrompts(pair.remote, 3, std=0.5)
    ids = tokens(2, 6)
    with torch.no_grad():
        plain = pair.remote(ids).logits
        text = pair.remote.generate(ids, max_new_tokens=5)
        cached = pair.remote(ids[:, :2], use_cache=True).past_key_values
        later = pair.remote(ids[:, 2:], past_key_values=cached).logits
    pair.remote(ids).logits.logsumexp(-1).sum().backward()
    gradient, prompts.prompts.grad = prompts.prompts.grad, None
    pair.swarm.own(place)
    with torch.no_grad():
        close(pair.remote(ids).logits, plain)
        assert pair.remote.generate(ids, max_new_tokens=5).tolist() == text.tolist()
        cached = pair.remote(ids[:, :2], use_cache=True).past_key_values
        close(pair.remote(ids[:, 2:], past_key_values=cached).logits, later)
    pair.remote(ids).logits.logsumexp(-1).sum().backward()
    assert gradient is not None
    close(prompts.prompts.grad, gradient)
    prompts.remove()


@pytest.mark.works("Blocks at home: prefix tuning, and a cache of transformers, with all of them")
def test_keys_and_values_of_somebody_else(pair: Pair) -> None:
    pair.swarm.own(slice(None))
    batch, found = padded(tokens(3, 12)), []
    for model in (pair.remote, pair.local):
        torch.manual_seed(0)
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        tuned: Any = get_peft_model(copy.deepcopy(model), config)
        loss = tuned(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        gradients = [one.grad for one in tuned.parameters() if one.grad is not None]
        assert len(gradients) == 1
        text = tuned.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        found.append([loss, *gradients, text])
    filled = pair.local(tokens(), use_cache=True).past_key_values
    for model, one in zip((pair.remote, pair.local), found, strict=True):
        with torch.no_grad():
            one.append(model(tokens(seed=1), past_key_values=copy.deepcopy(filled)).logits)
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)
    pair.swarm.release(2)
    with pytest.raises(Unsupported, match=r"another model has filled.*swarm\.own"):
        pair.remote(tokens(seed=1), past_key_values=filled)


@pytest.mark.works("Blocks at home: attention weights")
def test_attention_weights(pair: Pair) -> None:
    batch = padded(tokens(3, 12))
    pair.swarm.own(3)
    found = []
    for model in (pair.remote, pair.local):
        model.set_attn_implementation("eager")
        seen: list[torch.Tensor] = []
        attention = model.model.layers[3].self_attn
        handle = attention.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out[1]))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        found.append(seen[0])
    close(*found)
    with pytest.raises(Unsupported, match=r"output_attentions.*swarm\.own"):
        pair.remote(**batch, output_attentions=True)
    pair.remote.config.output_attentions = True
    with pytest.raises(Unsupported, match="output_attentions"):
        pair.remote(**batch)
    pair.remote.config.output_attentions = False
    pair.swarm.own(slice(None))
    with torch.no_grad():
        ours = pair.remote(**batch, output_attentions=True).attentions
        theirs = pair.local(**batch, output_attentions=True).attentions
    for mine, local in zip(ours, theirs, strict=True):
        close(mine, local)


def test_the_cache_follows(pair: Pair) -> None:
    """Crop, reorder, select, repeat and reset, with keys and values of block 3 here."""
    pair.swarm.own([3, 4])
    ids = tokens(3, 14)
    rows = torch.tensor([2, 0, 2])
    found = []
    with torch.no_grad():
        for model in (pair.remote, pair.local):
            seen = []
            cache = model(ids[:, :8], use_cache=True).past_key_values
            cache.crop(-2)
            seen.append(model(ids[:, 6:9], past_key_values=cache).logits)
            cache.reorder_cache(rows)
            seen.append(model(ids[rows, 9:10], past_key_values=cache).logits)
            cache.batch_select_indices(torch.tensor([1]))
            seen.append(model(ids[:1, 10:11], past_key_values=cache).logits)
            cache.batch_repeat_interleave(3)
            seen.append(model(ids[[0, 0, 0], 11:13], past_key_values=cache).logits)
            seen += [cache.layers[3].keys, cache.layers[4].values]
            assert not seen[-1].requires_grad
            found.append(seen)
        for ours, theirs in zip(*found, strict=True):
            close(ours, theirs)
        cache = pair.remote(ids, use_cache=True).past_key_values
        cache.reset()
        close(pair.remote(ids, past_key_values=cache).logits, pair.local(ids).logits)


def test_a_padded_cache_goes_on_without_a_mask(pair: Pair) -> None:
    batch, more = padded(tokens(3, 12)), tokens(3, 3, 5)
    pair.swarm.own([0, 3])
    with torch.no_grad():
        cache = pair.remote(**batch, use_cache=True).past_key_values
        ours = pair.remote(more, past_key_values=cache, position_ids=torch.tensor([[12, 13, 14]]))
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
        whole = torch.cat([batch["input_ids"], more], dim=1)
        theirs = pair.local(whole, attention_mask=mask)
    close(ours.logits, theirs.logits[:, 12:])


def test_a_step_that_failed_is_repeated(pair: Pair) -> None:
    """Keys that an own block has added in a pass which did not come to its end are forgotten."""
    pair.swarm.own([2])
    ids = tokens(2, 9)
    with torch.no_grad():
        cache = pair.remote(ids, use_cache=True).past_key_values
        handle = pair.remote.model.layers[3].register_forward_pre_hook(_fail)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                pair.remote(ids[:, :1], past_key_values=cache)
        handle.remove()
        ours = pair.remote(ids[:, :1], past_key_values=cache).logits
        close(ours, pair.local(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:])


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


def test_a_cache_belongs_to_the_blocks_that_filled_it(pair: Pair) -> None:
    ids = tokens()
    cache = pair.remote(ids, use_cache=True).past_key_values
    pair.swarm.own(2)
    with pytest.raises(Unsupported, match=r"came home.*start again"):
        pair.remote(ids[:, :1], past_key_values=cache)
    cache.reset()
    close(pair.remote(ids, past_key_values=cache).logits, pair.local(ids).logits)


@pytest.mark.refused("Gradients: through cached keys and values", "call without `past_key_values`")
def test_gradients_through_cached_keys_are_refused(pair: Pair) -> None:
    pair.swarm.own(4)
    pair.remote.model.layers[4].requires_grad_(True)
    ids = tokens()
    cache = pair.remote(ids).past_key_values
    with pytest.raises(Unsupported, match="gradients through cached keys"):
        pair.remote(ids[:, :1], past_key_values=cache)


def test_a_copy_has_weights_of_its_own(pair: Pair) -> None:
    pair.swarm.own(3)
    edit_a_weight(pair.remote)
    twin = copy.deepcopy(pair.remote)
    edit_a_weight(pair.local)
    pair.swarm.release()
    with torch.no_grad():
        close(twin(tokens()).logits, pair.local(tokens()).logits)
    pair.local = local_model(pair.folder)
    same(pair)


def test_the_state_dict_has_it(pair: Pair, tmp_path: Path) -> None:
    pair.swarm.own([1, 3])
    edit_a_weight(pair.remote)
    state = pair.remote.state_dict()
    whole = pair.local.state_dict()
    here = [name for name in whole if ".layers." not in name or ".1." in name or ".3." in name]
    assert sorted(state) == sorted(here)

    pair.remote.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sorted(saved) == sorted(here)
    edited = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(saved[edited], state[edited])
    with pytest.raises(ValueError, match="config"):  # it is no whole model, and says so
        AutoModelForCausalLM.from_pretrained(tmp_path)

    pair.swarm.release()
    pair.swarm.own([1, 3])
    pair.remote.load_state_dict(saved)
    edit_a_weight(pair.local)
    same(pair)


def test_a_model_that_is_all_here_is_saved_whole(pair: Pair, tmp_path: Path) -> None:
    pair.swarm.own(slice(None))
    edit_a_weight(pair.remote)
    pair.remote.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    edit_a_weight(pair.local)
    close(again(tokens()).logits, pair.local(tokens()).logits)


def test_other_dtypes(pair: Pair) -> None:
    pair.swarm.own([2, 3])
    twin = copy.deepcopy(pair.remote).to(torch.bfloat16)
    assert {p.dtype for p in twin.model.layers[2].parameters()} == {torch.bfloat16}
    with torch.no_grad():
        ours, theirs = twin(tokens()).logits, pair.local(tokens()).logits
    torch.testing.assert_close(ours.float(), theirs, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "qwen3_moe", "bloom"])
def test_families(family: str, tmp_path: Path) -> None:
    """Alternating windows, another list of blocks, experts, blocks that return tuples."""
    folder = tiny_model(family, tmp_path)
    count = resolve(folder).config().num_hidden_layers
    with pair_of(folder, [(0, 2), (2, count)]) as pair:
        for place in ([0, 2], [1, count - 1], slice(None)):
            pair.swarm.release()
            pair.swarm.own(place)
            same_everywhere(pair)


@contextmanager
def tuned(pair: Pair, *, own_first: bool, **options: Any) -> Iterator[tuple[Any, Any]]:
    """PEFT on both models, with the same weights."""
    from peft import LoraConfig, get_peft_model

    models = []
    for model in (pair.remote, pair.local):
        if model is pair.remote and own_first:
            pair.swarm.own([1, 3])
        torch.manual_seed(5)
        targets = ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options)
        peft_model: Any = get_peft_model(model, config)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        if model is pair.remote and not own_first:
            pair.swarm.own([1, 3])
        models.append(peft_model)
    yield models[0], models[1]


@pytest.mark.parametrize("own_first", [True, False])
def test_adapters_in_it_and_around_it(pair: Pair, own_first: bool) -> None:
    with tuned(pair, own_first=own_first) as (ours, theirs):
        same(pair)
        found = []
        for model in (ours, theirs):
            model.train()
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for step in range(2):
                optimizer.zero_grad()
                model(tokens(2, 9, step), labels=tokens(2, 9, step)).loss.backward()
                optimizer.step()
            model.eval()
            found.append({n: p.detach() for n, p in model.named_parameters() if "lora" in n})
        for name, parameter in found[1].items():
            close(found[0][name], parameter)
        same(pair)
        pair.swarm.release(3)
        same(pair)
        with ours.disable_adapter(), theirs.disable_adapter():
            same(pair)


@pytest.mark.works("Tools: nnsight's `.source`, in a block at home")
def test_nnsight_reads_the_source(pair: Pair) -> None:
    from nnsight import NNsight

    pair.swarm.own(3)
    found = []
    for model in (pair.remote, pair.local):
        wrapped: Any = NNsight(model)
        with torch.no_grad(), wrapped.trace(tokens()):
            inner = wrapped.model.layers[3].mlp.up_proj.output.save()
        with torch.no_grad(), wrapped.trace(tokens()):
            product = wrapped.model.layers[3].mlp.source.self_down_proj_0.output.save()
        found.append((product, inner))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


@pytest.mark.works("Blocks at home: `torch.export`, with all of them")
def test_export(pair: Pair) -> None:
    pair.remote.config.use_cache = False
    with pytest.raises(Unsupported, match=r"torch.export.*swarm.own"):
        torch.export.export(pair.remote, (tokens(),), strict=False)


def test_a_classifier_has_the_same_blocks_at_home(pair: Pair) -> None:
    pair.swarm.own(2)
    model: Any = pair.swarm.classifier(["a", "b"])
    assert model._runner.home == {2}
    model.config.pad_token_id = 0
    assert model(tokens()).logits.shape == (2, 2)
