"""Which checkpoints are told apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tiny import build, tiny_model

from swarm_notebook.checkpoint.files.digest import digest, matches
from swarm_notebook.checkpoint.files.dummy import DummyWeights
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.files.weights import INDEX_FILE
from swarm_notebook.errors import ModelNotFound


def of(folder: Path) -> str:
    return digest(resolve(folder))


def test_a_checkpoint_and_its_copies_have_one_digest(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    copy, sharded, part = tmp_path / "copy", tmp_path / "sharded", tmp_path / "part"
    shutil.copytree(folder, copy)
    build("llama").save_pretrained(sharded, max_shard_size="50KB")
    assert (sharded / INDEX_FILE).exists()
    assert of(folder) == of(copy) == of(sharded)
    shutil.copytree(sharded, part)
    next(part.glob("model-*.safetensors")).unlink()
    assert of(part) != of(folder)
    assert matches(of(part), of(folder))


def test_other_weights_and_other_configs_are_told_apart(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "one")
    other_seed = tiny_model("llama", tmp_path / "seed", seed=1)
    other_config = tiny_model("llama", tmp_path / "config", rms_norm_eps=1e-3)
    edited, changed = tmp_path / "edited", build("llama")
    with torch.no_grad():
        changed.model.layers[3].mlp.down_proj.weight += 1e-3  # one matrix of one block
    changed.save_pretrained(edited)
    half = tmp_path / "half"
    build("llama").to(torch.bfloat16).save_pretrained(half)
    others = [of(each) for each in (other_seed, other_config, edited, half)]
    assert len({of(folder), *others}) == 5
    assert not any(matches(of(folder), other) for other in others)


def test_dummy_weights_count_by_their_config(tmp_path: Path) -> None:
    ends = tmp_path / "_dummy-llama"  # embeddings and head, as a notebook has them
    model = build("llama")
    model.config.save_pretrained(ends)
    save_file({"lm_head.weight": torch.zeros(8, 4)}, ends / "model.safetensors", {"format": "pt"})
    assert of(ends) == digest(resolve(ends, dummy=True))
    assert of(ends) != of(tiny_model("llama", tmp_path / "real"))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    build("llama").save_pretrained(folder, max_shard_size="50KB")
    next(folder.glob("model-*.safetensors")).write_bytes(b"\xff" * 20)
    with pytest.raises(ModelNotFound, match="not a readable safetensors file"):
        of(folder)


def test_what_is_compared() -> None:
    assert matches("a-b", "a-b")
    assert matches("a", "a-b")
    assert not matches("a-b", "a-c")
    assert not matches("a-b", "b")
    assert not matches("a-b", "rubbish - of a - stranger")


def test_random_weights_are_the_same_whatever_torch_makes_by_default() -> None:
    config = build("llama").config
    name = "model.layers.0.mlp.up_proj.weight"
    usual = DummyWeights(config).lazy([name])[name][:]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = DummyWeights(config).lazy([name])[name][:]
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, usual, rtol=0, atol=0)
