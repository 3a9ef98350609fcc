"""What `resolve` finds, how it names it, and what it says when there is nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from support.tiny import tiny_model

from swarm_notebook.checkpoint.files.source import ModelSource, _repository_prefix, resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import BlocksOutOfRange, ModelNotFound, Unsupported


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "my model.v1"))


def test_a_folder_is_found_and_named_after_itself(copied: Path) -> None:
    source = resolve(str(copied))
    assert source.path == copied
    assert source.dht_prefix == "my-model-v1"
    assert source.repository is None
    assert source.config().model_type == "llama"
    assert source.tokenizer() is None
    assert source.generation_config() is not None


def test_a_config_is_a_copy(folder: Path) -> None:
    source = resolve(folder)
    source.config().num_hidden_layers = 1
    assert source.config().num_hidden_layers == 5


def test_a_relative_path_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert resolve(".").path == folder


@pytest.mark.parametrize(
    ("name", "family", "prefix"),
    [
        ("meta-llama/Llama-3.1-8B", "llama", "Llama-3-1-8B-hf"),
        ("enoch/llama-65b-hf", "llama", "llama-65b-hf"),
        ("tiiuae/falcon-40b", "falcon", "falcon-40b"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral", "mistralai/Mixtral-8x7B-v0-1"),
        ("bigscience/bloom", "bloom", "bigscience/bloom-petals"),
        ("Qwen/Qwen3-0.6B", "qwen3", "Qwen3-0-6B"),
    ],
)
def test_hub_names_follow_petals(name: str, family: str, prefix: str) -> None:
    assert _repository_prefix(name, family) == prefix


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (["model.safetensors"], "has no weights"),
        (["config.json"], "has no config.json"),
    ],
)
def test_a_folder_that_lacks_something_says_so(
    copied: Path, remove: list[str], message: str
) -> None:
    for name in remove:
        (copied / name).unlink()
    with pytest.raises(ModelNotFound, match=message):
        resolve(copied)


def test_pickles_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match=r"pytorch_model\.bin, a pickle.*convert it to safe"):
        resolve(copied)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 no model")
    with pytest.raises(ModelNotFound, match="is not a GGUF file"):
        resolve(path)


def test_a_name_that_exists_nowhere_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=r"'nobody/nothing'.*no such folder.*Hub"):
        resolve("nobody/nothing")


def test_a_model_itself_is_not_its_name() -> None:
    with pytest.raises(TypeError, match=r"model: a Linear, expected its folder, .* Hub id"):
        resolve(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["./nothing/here", "a/b/c", "missing.gguf", "~/nothing"])
def test_a_path_that_does_not_exist_is_no_hub_name(text: str) -> None:
    with pytest.raises(ModelNotFound, match="no such folder or file"):
        resolve(text)


@pytest.mark.parametrize("span", [(0, 6), (-1, 2), (3, 3), (4, 2), (5, 6)])
def test_blocks_out_of_range(folder: Path, span: tuple[int, int]) -> None:
    with pytest.raises(BlocksOutOfRange, match=r"the model has 5 blocks; give start:end"):
        load_blocks(resolve(folder), *span, dtype=torch.float32)


def test_a_config_that_is_no_language_model_is_refused(copied: Path) -> None:
    (copied / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(Unsupported, match="only causal language models"):
        resolve(copied).config()


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-family"}'])
def test_a_config_that_cannot_be_read_is_refused(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    with pytest.raises(ModelNotFound, match="config not readable"):
        resolve(copied).config()


@pytest.mark.parametrize("name", ["num_hidden_layers", "head_dim", "vocab_size"])
def test_absurd_numbers_are_refused_before_a_model_is_built(copied: Path, name: str) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, name: 10**12}))
    with pytest.raises(ModelNotFound, match=f"its config has {name} = 1000000000000"):
        resolve(copied).config()


def test_a_shard_that_is_cut_off_is_refused(copied: Path) -> None:
    weights, first = copied / "model.safetensors", copied / "first.safetensors"
    names = load_file(weights)
    weights.rename(first)
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "lie.0"], first.name)}))
    with pytest.raises(ModelNotFound, match=r"not what .*index.json says"):
        load_blocks(resolve(copied), 0, 1, dtype=torch.float32)
    first.write_bytes(first.read_bytes()[:5000])
    with pytest.raises(ModelNotFound, match="not readable as safetensors"):
        load_blocks(resolve(copied), 1, 2, dtype=torch.float32)


def test_weights_that_are_cut_off_are_refused(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelNotFound, match="not a readable safetensors file"):
        load_blocks(resolve(copied), 0, 1, dtype=torch.float32)


def test_weights_of_another_shape_are_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": 81}))
    with pytest.raises(ModelNotFound, match=r"do not fit its config: .*80.*81"):
        load_blocks(resolve(copied), 0, 1, dtype=torch.float32)


def test_weights_that_lack_blocks_are_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    source = resolve(copied)
    load_blocks(source, 0, 5, dtype=torch.float32)
    with pytest.raises(ModelNotFound, match=r"lack .* tensors that LlamaModel needs"):
        load_blocks(source, 4, 6, dtype=torch.float32)


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    path = _sharded(folder, tmp_path / "sharded")
    victim = max(path.glob("model-*.safetensors"))
    victim.unlink()
    with pytest.raises(ModelNotFound, match=victim.name):
        load_blocks(resolve(path), 0, 5, dtype=torch.float32)


def _sharded(folder: Path, path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("model-*.safetensors"))) > 3
    return path


def test_an_index_may_not_point_out_of_the_model(folder: Path, tmp_path: Path) -> None:
    path = _sharded(folder, tmp_path / "sharded")
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(ModelNotFound, match="refused"):
        load_blocks(resolve(path), 0, 5, dtype=torch.float32)


def test_of_a_cached_repository_only_the_needed_shards_are_sought(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's cache holds the shard of block 0 only, as after a server's download of it."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--org--tiny.model"
    snapshot = repository / "snapshots" / commit
    _sharded(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    shards = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in shards.items() if ".layers.0." in name}
    for path in snapshot.glob("model-*.safetensors"):
        if path.name not in needed:
            path.unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = resolve("org/tiny.model")
    assert source.dht_prefix == "tiny-model-hf"
    assert source.repository == "https://huggingface.co/org/tiny.model"
    assert len(load_blocks(source, 0, 1, dtype=torch.float32).layers) == 1
    with pytest.raises(ModelNotFound, match="is neither on the Hub nor in its cache"):
        load_blocks(source, 3, 5, dtype=torch.float32)


def test_a_source_is_a_value(folder: Path) -> None:
    assert resolve(folder) == resolve(str(folder))
    assert isinstance(hash(resolve(folder)), int)
    assert isinstance(resolve(folder), ModelSource)
