"""What transformers and torch find when they look at the model, or hand something to it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.scene import TOLERANCE, Scene, generate, scene
from support.tiny import tiny_model
from transformers import DynamicCache, StaticCache

from swarm_notebook.errors import Unsupported
from swarm_notebook.model.generation.cache import RemoteCache


@pytest.mark.works("The model: `config._attn_implementation`, `set_attn_implementation`")
def test_the_attention_implementation_reads_as_transformers_knows_it(tiny_scene: Scene) -> None:
    remote, local = tiny_scene.remote, tiny_scene.reference
    seen: list[str] = []
    hook = remote.lm_head.register_forward_hook(
        lambda *_: seen.append(remote.config._attn_implementation)
    )
    with torch.no_grad():
        remote(tiny_scene.ids(1, 4))
        generate(remote, tiny_scene.ids(1, 4))
    hook.remove()
    assert {remote.config._attn_implementation, *seen} == {local.config._attn_implementation}
    twin = copy.deepcopy(remote)
    twin.set_attn_implementation("eager")
    assert twin.config._attn_implementation == "eager"
    with torch.no_grad():
        twin(tiny_scene.ids(1, 4))
    assert twin.config._attn_implementation == "eager"
    with pytest.raises(Unsupported):
        remote(tiny_scene.ids(1, 4), output_attentions=True)
    assert remote.config._attn_implementation == local.config._attn_implementation


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(),
    "dynamic of a config": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.works(
    "Caches: an empty `DynamicCache`, `StaticCache` handed in (becomes the swarm's, with a warning)"
)
def test_an_empty_cache_becomes_the_swarms(tiny_scene: Scene, kind: str) -> None:
    """The object stays: a loop that looks at nothing but its own cache goes on with it."""
    ids = tiny_scene.ids(2, 9)
    whole = tiny_scene.reference(ids).logits
    cache = CACHES[kind](tiny_scene.reference.config)
    with pytest.warns(UserWarning, match=r"this \w+Cache became a RemoteCache"):
        first = tiny_scene.remote(ids[:, :5], past_key_values=cache)
    with warnings.catch_warnings(action="error"):
        second = tiny_scene.remote(ids[:, 5:], past_key_values=cache)
    assert first.past_key_values is cache
    assert cache.get_seq_length() == 9
    logits = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(logits, whole, atol=TOLERANCE, rtol=0)


def test_an_empty_cache_in_generate(tiny_scene: Scene) -> None:
    ids = tiny_scene.ids(1, 5)
    theirs = generate(tiny_scene.reference, ids, past_key_values=DynamicCache())
    cache: Any = DynamicCache()
    with pytest.warns(UserWarning, match="this DynamicCache became a RemoteCache"):
        ours = generate(tiny_scene.remote, ids, past_key_values=cache)
    tiny_scene.same(ours, theirs)
    assert isinstance(cache, RemoteCache)
    assert cache.get_seq_length() == ours.sequences.shape[1] - 1


@torch.no_grad()
@pytest.mark.works("The model: `torch.compile`, around the blocks")
def test_compiled_around_the_blocks_or_refused(tiny_scene: Scene) -> None:
    ids = tiny_scene.ids(1, 5)
    torch._dynamo.reset()  # what was left out of a graph once stays so without a word
    whole: Any = torch.compile(tiny_scene.remote, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"fullgraph=True\): blocks run on servers"):
        whole(ids)
    with pytest.raises(Unsupported, match=r"fullgraph=True\): blocks run on servers"):
        tiny_scene.remote.compile(fullgraph=True)
    expected = tiny_scene.reference(ids).logits
    compiled: Any = torch.compile(tiny_scene.remote, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, expected, atol=TOLERANCE, rtol=0)
    forward: Any = torch.compile(tiny_scene.remote.forward, backend="eager")
    torch.testing.assert_close(forward(ids).logits, expected, atol=TOLERANCE, rtol=0)
    tiny_scene.remote.compile(backend="eager")
    torch.testing.assert_close(tiny_scene.remote(ids).logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.works("Calls: more rows than a server takes in one request")
def test_more_rows_than_a_server_takes_at_once(tiny_llama: Path) -> None:
    with scene(tiny_llama, 1, hosted=True, cache_tokens=64) as stage:
        ids = stage.ids(11, 20)
        found = []
        for model in (stage.remote, stage.reference):
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits
            logits.sum().backward()
            found.append((logits.detach(), embedded.grad))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=1e-4)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tiny_model("mixtral", tmp_path_factory.mktemp("models"))
    with scene(folder, [(0, 2), (2, 5)], hosted=True) as made:
        yield made


def _routed(stage: Scene, **options: Any) -> tuple[Any, Any]:
    ids = stage.ids(3, 8)
    asked = {"labels": ids, "output_router_logits": True, **options}
    ours, theirs = stage.remote(ids, **asked), stage.reference(ids, **asked)
    for name in ("loss", "aux_loss", "logits"):
        torch.testing.assert_close(ours[name], theirs[name], atol=TOLERANCE, rtol=1e-4)
    for mine, local in zip(ours.router_logits, theirs.router_logits, strict=True):
        torch.testing.assert_close(mine, local, atol=TOLERANCE, rtol=1e-4)
    return ours, theirs


@pytest.mark.works("Calls: `output_router_logits` (values, auxiliary loss)")
def test_router_logits(experts: Scene) -> None:
    """Of a plain call, of a cache, of a padded batch, of a config that asks for them."""
    with torch.no_grad():
        _routed(experts)
        _routed(experts, use_cache=True)
        _routed(experts, attention_mask=experts.padded()["attention_mask"][:, -8:])
    config = experts.remote.config
    config.output_router_logits = experts.reference.config.output_router_logits = True
    try:
        with torch.no_grad():
            _routed(experts, output_router_logits=None)
    finally:
        config.output_router_logits = experts.reference.config.output_router_logits = False
    with torch.no_grad():
        assert experts.remote(experts.ids(1, 4)).router_logits is None


@pytest.mark.refused(
    "Gradients: through router logits, or other outputs inside remote blocks",
    "bring the blocks home: `swarm.own(slice(None))`",
)
def test_router_logits_while_training(experts: Scene) -> None:
    """They have values; a loss that needs gradients through them is refused, not left without."""
    ids = experts.ids(1, 6)
    model: Any = get_peft_model(
        copy.deepcopy(experts.remote), LoraConfig(target_modules=["q_proj"], lora_alpha=8)
    )
    output = model(ids, labels=ids, output_router_logits=True)
    with torch.no_grad():
        local = experts.reference(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(output.aux_loss.detach(), local.aux_loss, atol=1e-4, rtol=1e-4)
    with pytest.raises(Unsupported, match=r"gradients through the output of block \d\.mlp\.gate"):
        output.loss.backward()
    model(ids, labels=ids).loss.backward()
