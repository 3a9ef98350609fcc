"""What people do to a model without asking: it works as on a local one, or is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scene import TOLERANCE, Scene
from torch import nn
from transformers import GenerationConfig

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
