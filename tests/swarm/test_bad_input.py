"""Bad input: each kind has its own typed error, whose words say what was found and what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.patience import within
from support.scene import Scene, generate
from support.tiny import tiny_config, tiny_model
from transformers import DynamicCache

import swarm_notebook as sn
from swarm_notebook import cli
from swarm_notebook.errors import (
    AddressError,
    ConnectionFailed,
    ContextTooLong,
    ModelNotFound,
    ModelNotServed,
    Unsupported,
)

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
CONTEXT = 256


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        (NOBODY, ConnectionFailed, rf"none of the initial peers answered: {NOBODY}.*port is open"),
        ("a server", AddressError, "initial_peers: 'a server' is not .*expected the form /ip4/"),
        ("/ip4/127.0.0.1/tcp/99999/p2p/Qm", AddressError, "initial_peers: '/ip4/127.0.0.1/tcp/999"),
        ("/ip4/127.0.0.1/tcp/31330", AddressError, "'/ip4/127.0.0.1/tcp/31330' lacks the peer id"),
    ],
    ids=["unreachable", "malformed", "impossible", "no peer id"],
)
def test_addresses(address: str, error: type[Exception], words: str, tiny_llama: Path) -> None:
    with within(20), pytest.raises(error, match=words):
        sn.connect([address], model=tiny_llama)


def test_a_model_that_nobody_serves(tiny_scene: Scene, tmp_path: Path) -> None:
    other = tiny_model("gpt2", tmp_path)
    with pytest.raises(ModelNotServed, match=r"nobody .* serves 'tiny-gpt2'; it serves tiny-llama"):
        sn.connect(tiny_scene.local.initial_peers, model=other)


def test_a_model_that_has_to_be_named(tiny_scene: Scene) -> None:
    with pytest.raises(ModelNotServed, match=r"serves tiny-llama, but .* give the folder or file"):
        sn.connect(tiny_scene.local.initial_peers)


def test_models_that_are_not_there(tiny_scene: Scene, tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "text").write_text("no model")
    for model, words in {
        tmp_path: "has no weights: neither model.safetensors",
        tmp_path / "text": "is not a GGUF file",
        "nobody/no-such-model-at-all": "'nobody/no-such-model-at-all': no such folder or file",
        "not a name!": "'not a name!': no such folder or file, and not the form of a Hub id",
    }.items():
        with pytest.raises(ModelNotFound, match=words):
            sn.connect(tiny_scene.local.initial_peers, model=model)


def test_serving_blocks_that_the_model_does_not_have(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", str(tiny_llama), "--blocks", "3:9"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "blocks 3:9" in error
    assert "5 blocks" in error


Attempt = Callable[[Scene, Any, torch.Tensor], object]


def _cached(stage: Scene, rows: int = 1) -> Any:
    return stage.remote(stage.ids(rows, 6), use_cache=True).past_key_values


def _filled(stage: Scene, length: int = 6) -> DynamicCache:
    return stage.reference(stage.ids(1, length), past_key_values=DynamicCache()).past_key_values


def _masked(stage: Scene, model: Any, ids: torch.Tensor) -> object:
    mask = torch.ones(1, 6 + ids.shape[1], dtype=torch.long)
    mask[0, 2] = 0
    return model(ids, past_key_values=_cached(stage), attention_mask=mask)


ATTEMPTS: dict[str, tuple[Attempt, type[Exception], str]] = {
    "long prompt": (
        lambda stage, model, ids: model(stage.ids(1, CONTEXT + 1)),
        ContextTooLong,
        rf"{CONTEXT + 1} tokens .* more than the model's context of {CONTEXT}; shorten",
    ),
    "long prompt in generate": (
        lambda stage, model, ids: generate(model, stage.ids(1, CONTEXT + 1)),
        ContextTooLong,
        rf"{CONTEXT + 1} tokens",
    ),
    "a foreign cache": (
        lambda stage, model, ids: model(ids, past_key_values=_filled(stage)),
        Unsupported,
        "past_key_values is a DynamicCache that another model has filled; .* Pass None",
    ),
    "a foreign cache in generate": (
        lambda stage, model, ids: generate(model, ids, past_key_values=_filled(stage, length=2)),
        Unsupported,
        "past_key_values is a DynamicCache that another model has filled",
    ),
    "a static cache": (
        lambda stage, model, ids: generate(model, ids, cache_implementation="static"),
        Unsupported,
        "cache_implementation='static': .* leave it out",
    ),
    "a cache of other rows": (
        lambda stage, model, ids: model(ids, past_key_values=_cached(stage, rows=2)),
        ValueError,
        "the batch has 1 rows, past_key_values has 2",
    ),
    "a mask that changes the past": (_masked, Unsupported, "changes tokens that are in the cache"),
    "a short mask": (
        lambda stage, model, ids: model(ids, attention_mask=torch.ones(1, 3)),
        ValueError,
        r"attention_mask has length 3, expected 0 cached \+ 4 new tokens = 4",
    ),
    "a short mask without cache": (
        lambda stage, model, ids: model(ids, attention_mask=torch.ones(1, 3), use_cache=False),
        ValueError,
        "attention_mask has length 3, the input has 4 tokens",
    ),
    "a 4D mask": (
        lambda stage, model, ids: model(ids, attention_mask=torch.ones(1, 1, 4, 4)),
        Unsupported,
        r"a mask of shape \[batch, length\] only; .*swarm\.own\(slice\(None\)\)",
    ),
    "attentions": (
        lambda stage, model, ids: model(ids, output_attentions=True),
        Unsupported,
        "output_attentions: remote blocks return hidden states only",
    ),
    "attentions in generate": (
        lambda stage, model, ids: generate(model, ids, output_attentions=True),
        Unsupported,
        "output_attentions",
    ),
    "NaN": (
        lambda stage, model, ids: model(inputs_embeds=torch.full((1, 4, 48), torch.nan)),
        Unsupported,
        "block 0: its input has NaN or infinite values",
    ),
    "NaN in a session": (
        lambda stage, model, ids: model(
            inputs_embeds=torch.full((1, 4, 48), torch.nan), use_cache=True
        ),
        Unsupported,
        "block 0: its input has NaN or infinite values",
    ),
    "pickle": (
        lambda stage, model, ids: pickle.dumps(model),
        Unsupported,
        "live connection and cannot be pickled",
    ),
    "saving weights": (
        lambda stage, model, ids: model.save_pretrained("nowhere"),
        Unsupported,
        "weights of a remote model are on the servers",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ATTEMPTS)
def test_calls_of_the_model(tiny_scene: Scene, name: str) -> None:
    attempt, error, words = ATTEMPTS[name]
    ids = tiny_scene.ids(1, 4)
    with within(10), pytest.raises(error, match=words):  # nobody waits for another server
        attempt(tiny_scene, tiny_scene.remote, ids)
    # The model is as usable as before.
    torch.testing.assert_close(
        tiny_scene.remote(ids).logits, tiny_scene.reference(ids).logits, atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_a_cache_of_another_connection_and_a_closed_one(
    tiny_scene: Scene, tiny_llama: Path
) -> None:
    ids = tiny_scene.ids(1, 4)
    with sn.connect(tiny_scene.local.initial_peers, model=tiny_llama) as other:
        with pytest.raises(ValueError, match="past_key_values belongs to another connection"):
            other.model(ids, past_key_values=_cached(tiny_scene))
        model: Any = other.model
        cache = model(ids, use_cache=True).past_key_values
    for attempt in (lambda: model(ids), lambda: model(ids, past_key_values=cache)):
        with pytest.raises(ConnectionFailed, match=r"disconnected.*connect"):
            attempt()
