"""What people do to a model without asking: it works as on a local one, or is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scene import TOLERANCE, Scene, scene
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, GraniteConfig, GraniteForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from swarm_notebook.errors import Unsupported


@pytest.fixture
def model(tiny_scene: Scene) -> Any:
    """A remote model that no test has changed."""
    return copy.deepcopy(tiny_scene.remote)


@torch.no_grad()
def as_local(scene: Scene, model: Any) -> None:
    """Whatever was refused, the model goes on as ever."""
    ids = scene.ids(2, 9)
    torch.testing.assert_close(
        model(ids).logits, scene.reference(ids).logits, atol=TOLERANCE, rtol=0
    )


def of_embeddings(model: Any, ids: torch.Tensor) -> tuple[Callable[[Any], Any], torch.Tensor]:
    embeds = model.get_input_embeddings()(ids).detach()
    return lambda x: model(inputs_embeds=x, use_cache=False).logits.square().mean(), embeds


def by_vmap(model: Any, ids: torch.Tensor) -> None:
    torch.func.vmap(lambda row: model(row[None]).logits)(ids)


def by_func_grad(model: Any, ids: torch.Tensor) -> None:
    function, embeds = of_embeddings(model, ids)
    torch.func.grad(function)(embeds)


def by_jvp(model: Any, ids: torch.Tensor) -> None:
    function, embeds = of_embeddings(model, ids)
    torch.func.jvp(function, (embeds,), (embeds,))


def by_dual_numbers(model: Any, ids: torch.Tensor) -> None:
    function, embeds = of_embeddings(model, ids)
    with torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(embeds, embeds))


@pytest.mark.refused(
    "Gradients: `torch.func` (`vmap`, `grad`, `jvp` …), forward mode",
    "a batch, `torch.autograd.grad`, or `swarm.own(slice(None))`",
)
@pytest.mark.parametrize("ask", [by_vmap, by_func_grad, by_jvp, by_dual_numbers])
def test_transformed_functions(tiny_scene: Scene, model: Any, ask: Callable[..., None]) -> None:
    with pytest.raises(Unsupported, match=r"torch\.autograd\.grad.*swarm\.own"):
        ask(model, tiny_scene.ids(2, 9))
    as_local(tiny_scene, model)


@pytest.mark.refused(
    "Hooks: NaN or infinity into a remote block, forward or back",
    "`torch.nan_to_num`, or `swarm.own(slice(block, None))`",
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite(tiny_scene: Scene, model: Any, value: float) -> None:
    ids = tiny_scene.ids(2, 9)

    def spoil(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([3]), value)

    handle = model.model.layers[1].register_forward_hook(spoil)
    for use in (model, lambda ids: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(
            Unsupported, match=r"block 2: its input has NaN.*own\(slice\(2, None\)\)"
        ):
            use(ids)
    handle.remove()
    model.model.layers[-1].register_forward_hook(spoil)
    assert not model(ids).logits.isfinite().any()  # as the local one: no server has to do with it
    embeds = tiny_scene.remote.get_input_embeddings()(ids).detach().requires_grad_()
    logits = tiny_scene.remote(inputs_embeds=embeds).logits
    with pytest.raises(Unsupported, match=r"gradient of its output has NaN.*swarm\.own"):
        logits.backward(torch.full_like(logits, value))
    as_local(tiny_scene, tiny_scene.remote)


@pytest.mark.refused(
    "Gradients: several at once (`is_grads_batched`, `vectorize=True`)",
    "one after the other with `retain_graph=True`, or `swarm.own(slice(None))`",
)
def test_batched_gradients(tiny_scene: Scene, model: Any) -> None:
    embeds = model.get_input_embeddings()(tiny_scene.ids(1, 5)).detach().requires_grad_()
    some = model(inputs_embeds=embeds).logits[0, -1, :3]
    with pytest.raises(Unsupported, match=r"retain_graph=True.*swarm\.own"):
        torch.autograd.grad(some, embeds, torch.eye(3), is_grads_batched=True)


def other_embeddings(model: Any) -> None:
    def hook(_: Any, args: tuple, named: dict) -> tuple[tuple, dict]:
        half = tuple(0.5 * part for part in named["position_embeddings"])
        return args, {**named, "position_embeddings": half}

    model.model.layers[2].register_forward_pre_hook(hook, with_kwargs=True)


def other_mask(model: Any) -> None:
    def hook(_: Any, args: tuple, named: dict) -> tuple[tuple, dict]:
        return args, {**named, "attention_mask": torch.zeros(2, 1, 9, 9)}

    model.model.layers[2].register_forward_pre_hook(hook, with_kwargs=True)


class Shifted(nn.Module):
    """A block that is told it was elsewhere."""

    def __init__(self, block: nn.Module, rotary: nn.Module):
        super().__init__()
        self.block, self.rotary = block, rotary

    def forward(self, hidden: torch.Tensor, **named: Any) -> Any:
        ids = torch.arange(hidden.shape[1])[None] + 5
        return self.block(hidden, **{**named, "position_embeddings": self.rotary(hidden, ids)})


def other_positions(model: Any) -> None:
    layers = model.model.layers
    layers[2] = Shifted(layers[2], model.model.rotary_emb)


def hooked_rotary(model: Any) -> None:
    model.model.rotary_emb.register_forward_hook(lambda _m, _i, out: (out[0] * 0.5, out[1]))


def patched_rotary(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.forward = lambda hidden, ids: type(rotary).forward(rotary, hidden, ids + 1)


def slower_rotary(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def scaled_rotary(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 2.0


def another_rotary(model: Any) -> None:
    model.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)


OTHER = [other_embeddings, other_mask, other_positions, hooked_rotary, patched_rotary]
OTHER += [slower_rotary, scaled_rotary, another_rotary]


@pytest.mark.refused(
    "Hooks: exchange masks, positions or rotary embeddings of remote blocks", "`swarm.own(block)`"
)
@pytest.mark.parametrize("change", OTHER)
def test_what_blocks_are_given(
    tiny_scene: Scene, model: Any, change: Callable[[Any], None]
) -> None:
    """Only hidden states travel; the rest is made anew by servers."""
    change(model)
    with pytest.raises(Unsupported, match=r"swarm\.own"):
        model(tiny_scene.ids(2, 9))
    as_local(tiny_scene, tiny_scene.remote)


@pytest.fixture
def llama_classes(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Puts another ``forward`` on a class of transformers."""

    def patch(name: str, forward: Any) -> None:
        monkeypatch.setattr(getattr(modeling_llama, name), "forward", forward)

    return patch


@pytest.mark.refused(
    "Hooks: a `forward` of a class inside remote blocks, patched (`LlamaMLP.forward = …`)",
    "hook the blocks, or `swarm.own(slice(None))`",
)
@pytest.mark.parametrize("name", ["LlamaMLP", "LlamaAttention", "LlamaDecoderLayer"])
def test_patched_classes(
    tiny_scene: Scene, model: Any, llama_classes: Callable[[str, Any], None], name: str
) -> None:
    llama_classes(name, lambda _self, hidden, **_: hidden)
    with pytest.raises(Unsupported, match=rf"{name}\.forward was replaced.*swarm\.own"):
        model(tiny_scene.ids(2, 9))


@pytest.mark.refused(
    "Hooks: a function that blocks call, patched (`modeling_llama.apply_rotary_pos_emb = …`)",
    "hook the blocks, or `swarm.own(slice(None))`",
)
@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "eager_attention_forward"])
def test_patched_functions(
    tiny_scene: Scene, model: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ids = tiny_scene.ids(2, 9)
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, name, lambda *_args, **_named: None)
        with pytest.raises(Unsupported, match=rf"{name} was replaced.*swarm\.own"):
            model(ids)
    as_local(tiny_scene, model)


def test_classes_of_single_modules(tiny_scene: Scene, model: Any) -> None:
    """Of a module inside of a block it is refused; around a block it is a wrapper like another."""

    def halved(module: Any) -> None:
        kind = type(module)
        forward = {"forward": lambda self, hidden, **named: kind.forward(self, hidden / 2, **named)}
        module.__class__ = type("Halved", (kind,), forward)

    local = copy.deepcopy(tiny_scene.reference)
    for one in (model, local):
        halved(one.model.layers[2])
    ids = tiny_scene.ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, local(ids).logits, atol=TOLERANCE, rtol=1e-4)
    halved(model.model.layers[1].mlp)
    with pytest.raises(Unsupported, match=r"class of mlp was changed.*swarm\.own\(1\)"):
        model(ids)


@pytest.mark.refused(
    "Calls: an attention function of your own (`AttentionInterface.register`)",
    "`swarm.own(slice(None))`",
)
def test_an_attention_function_of_ones_own(
    tiny_scene: Scene, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(_module: Any, query: Any, *_: Any, **__: Any) -> Any:
        return query.transpose(1, 2), None

    ids, known = tiny_scene.ids(2, 9), ALL_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(known, "mine", mine)
    model.set_attn_implementation("mine")
    with pytest.raises(
        Unsupported, match=r"attention 'mine' is a function of your own.*swarm\.own"
    ):
        model(ids)
    model.set_attn_implementation("eager")
    as_local(tiny_scene, model)
    monkeypatch.setitem(known, "sdpa", mine)
    model.set_attn_implementation("sdpa")
    with pytest.raises(Unsupported, match="attention 'sdpa' is a function of your own"):
        model(ids)


@pytest.mark.refused(
    "Calls: masks by another config (`is_causal`, `sliding_window`, `layer_types`)",
    "`swarm.own(slice(None))`",
)
@pytest.mark.parametrize(("name", "value"), [("is_causal", False), ("sliding_window", 3)])
def test_masks_by_another_config(tiny_scene: Scene, model: Any, name: str, value: object) -> None:
    setattr(model.config, name, value)
    with pytest.raises(Unsupported, match=rf"config\.{name} is .* and was .*swarm\.own"):
        model(tiny_scene.ids(2, 9))


def test_what_is_noted_on_modules(tiny_scene: Scene, model: Any) -> None:
    """Names of the user's own are nobody's concern; what a forward reads is."""
    for name, module in model.named_modules():
        module.name, module.number = name, 3
    as_local(tiny_scene, model)
    model.model.layers[2].self_attn.scaling = 0.5
    with pytest.raises(Unsupported, match=r"self_attn\.scaling was changed"):
        model(tiny_scene.ids(2, 9))


def test_numbers_of_a_block_itself(tmp_path: Path) -> None:
    """Some families scale what a block adds by a number of the block's own."""
    settings = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    config = GraniteConfig(**settings, pad_token_id=0, residual_multiplier=0.7)
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    with scene(tmp_path, 2, hosted=True) as granite:
        as_local(granite, granite.remote)
        granite.remote.model.layers[1].residual_multiplier = 0.1
        with pytest.raises(Unsupported, match=r"block 1: residual_multiplier was changed"):
            granite.remote(granite.ids(2, 9))


def test_hooks_for_all_modules(tiny_scene: Scene, model: Any) -> None:
    with (
        register_module_forward_hook(lambda *_: None),
        pytest.warns(UserWarning, match=r"not the modules inside of them.*swarm\.own"),
    ):
        model(tiny_scene.ids(2, 9))


@pytest.mark.refused(
    "Calls: modes of torch (`FlopCounterMode`, `TorchFunctionMode`) see no remote block, which a "
    "warning says",
    "`swarm.own(slice(None))`",
)
def test_modes_of_torch(tiny_scene: Scene, model: Any) -> None:
    with (
        FlopCounterMode(display=False),
        pytest.warns(UserWarning, match=r"FlopCounterMode: .*remote blocks.*swarm\.own"),
    ):
        model(tiny_scene.ids(2, 9))
    with warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("error")
        as_local(tiny_scene, model)


@pytest.mark.works("Hooks: read the arguments of blocks (`with_kwargs=True`)")
@torch.no_grad()
def test_arguments_are_those_of_a_local_model(tiny_scene: Scene, model: Any) -> None:
    seen: list[list[Any]] = []
    for one in (model, copy.deepcopy(tiny_scene.reference)):
        seen.append([])

        def hook(_: Any, args: tuple, named: dict, found: list[Any] = seen[-1]) -> Any:
            found.append((sorted(named), args[0].clone(), named["position_embeddings"][0]))
            return args, dict(named)

        for layer in one.model.layers:
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        one(tiny_scene.ids(2, 9))
    for ours, theirs in zip(*seen, strict=True):
        assert ours[0] == theirs[0]
        torch.testing.assert_close(ours[1:], theirs[1:], atol=TOLERANCE, rtol=0)


@pytest.mark.works("The model: `type(model).from_pretrained`, `type(model)(config)` (local models)")
def test_its_class_makes_local_models(tiny_scene: Scene, model: Any, tiny_llama: Path) -> None:
    as_local(tiny_scene, type(model).from_pretrained(tiny_llama))
    assert type(type(model)(model.config)) is type(tiny_scene.reference)
    as_local(tiny_scene, model)


@pytest.mark.refused(
    "Generation: continuous batching (`generate_batch`)",
    "a padded batch, or several threads; servers batch sessions themselves",
)
def test_continuous_batching(tiny_scene: Scene, model: Any) -> None:
    settings = GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    with pytest.raises(Unsupported, match="padded batch"):
        model.generate_batch(tiny_scene.ids(1, 5).tolist(), generation_config=settings)


@pytest.mark.refused(
    "Caches: `cache_implementation` (`static`, `quantized`, `offloaded` …)", "leave it out"
)
@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_kinds_of_caches(tiny_scene: Scene, model: Any, kind: str) -> None:
    with pytest.raises(Unsupported, match=r"kept by their servers; leave it out"):
        model.generate(tiny_scene.ids(1, 5), max_new_tokens=2, cache_implementation=kind)


@pytest.mark.refused(
    "Training: dropout inside remote blocks is not applied, which a warning says",
    "an adapter's dropout, or `swarm.own(slice(None))`",
)
def test_dropout_in_blocks(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()  # nothing to say: this family drops nothing
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    with pytest.warns(UserWarning, match=r"attention_dropout\) is not applied.*swarm\.own"):
        model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval().train()  # said once
