"""The probing helpers on a remote model, each against the same call on the local model.

The store is also tried where it matters: the only server is killed in the middle, the store on
disk is damaged, extended, read by another process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import letters
import peft
import pytest
import shared
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import swarm_notebook as sn
from swarm_notebook import probing
from swarm_notebook.probing import states as states_module
from swarm_notebook.tuning import MANIFEST_FILE

BLOCKS = 5
TEXTS = [f"{'the quick brown fox'[: 4 + n % 13]} {n}" for n in range(20)]


@dataclass
class Pair:
    swarm: Any
    local: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters.add_tokenizer(tiny_model("llama", tmp_path_factory.mktemp("probing")))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Pair]:
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with (
        sn.LocalSwarm(folder, [(0, 2), (2, BLOCKS)], threads=1) as servers,
        sn.connect(servers.initial_peers, model=folder) as swarm,
    ):
        yield Pair(swarm, local.requires_grad_(False), AutoTokenizer.from_pretrained(folder))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def shard_files(store: Path) -> dict[str, int]:
    """The shards of a store, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(store.glob("*/shard-*"))}


@pytest.mark.parametrize("pool", [None, "last", "mean"])
def test_hidden_states(pair: Pair, pool: Any, tmp_path: Path) -> None:
    """In memory, on disk and one text at a time, remote and local: all the same."""
    options: dict[str, Any] = {"pool": pool, "blocks": [0, 3, -1], "batch_size": 3}
    remote = probing.hidden_states(pair.swarm, TEXTS, store=tmp_path, shard_texts=8, **options)
    memory = probing.hidden_states(pair.swarm, TEXTS, **options)
    local = probing.hidden_states(pair.local, TEXTS, tokenizer=pair.tokenizer, **options)
    assert remote.blocks == [0, 3, 4]
    for number, text in enumerate(TEXTS):
        ids = pair.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            plain = pair.local.model(ids, output_hidden_states=True)
            kept: dict[int, torch.Tensor] = dict(enumerate(plain.hidden_states[1:-1]))
        for block in (0, 3):
            alone = kept[block][0]
            expected = {None: alone, "last": alone[-1:], "mean": alone.mean(0, keepdim=True)}[pool]
            for states in (remote, memory, local):
                same(states.text(number, block), expected)
    if pool is None:
        with pytest.raises(ValueError, match="per token"):
            remote[3]
    else:
        assert remote[3].shape == (len(TEXTS), 48)
        same(remote[4], local[4])
    assert len(shard_files(tmp_path)) == 3
    assert remote.manifest is not None
    assert remote.manifest["blocks"] == BLOCKS


def test_a_store_grows_by_what_is_missing(pair: Pair, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pool": "last", "store": tmp_path, "shard_texts": 8}
    probing.hidden_states(pair.swarm, TEXTS[:8], blocks=[1], **options)
    first = shard_files(tmp_path)
    # More texts in another order, one of them twice, and another block.
    order = [*reversed(TEXTS[:12]), TEXTS[3]]
    states = probing.hidden_states(pair.swarm, order, blocks=[1, 2], **options)
    files = shard_files(tmp_path)
    assert {name: when for name, when in files.items() if name in first} == first
    index = json.loads(next(tmp_path.glob("*/index.json")).read_text())
    assert [(entry["texts"], entry["blocks"]) for entry in index["shards"]] == [
        (8, [1]),
        (4, [1, 2]),
        (8, [2]),
    ]
    expected = probing.hidden_states(pair.swarm, order, blocks=[1, 2], pool="last")
    for block in (1, 2):
        same(states[block], expected[block])
    # Nothing is asked any more; another dtype, pooling or tag is kept apart.
    probing.hidden_states(pair.swarm, order, blocks=[1], **options)
    assert shard_files(tmp_path) == files
    half = probing.hidden_states(pair.swarm, order, dtype=torch.float16, tag="half", **options)
    assert half[1].dtype == torch.float16
    assert len(list(tmp_path.iterdir())) == 2


def test_a_store_is_read_back_by_another_process(pair: Pair, tmp_path: Path) -> None:
    states = probing.hidden_states(pair.swarm, TEXTS, pool="mean", store=tmp_path, shard_texts=8)
    code = (
        "import sys, torch; from swarm_notebook.probing import load_states\n"
        "states = load_states(sys.argv[1], pool='mean')\n"
        "print(states); torch.save(states[2], sys.argv[2])\n"
        "assert states.manifest['route'], states.manifest"
    )
    matrix = tmp_path.with_suffix(".pt")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(matrix)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == repr(states)
    assert "20 texts, blocks 0:5, mean of tokens, float32" in done.stdout
    assert torch.equal(torch.load(matrix), states[2])
    picked = probing.load_states(tmp_path, texts=TEXTS[5:7])
    assert torch.equal(picked[2], states[2][5:7])
    with pytest.raises(FileNotFoundError, match="pool"):
        probing.load_states(tmp_path, pool="last")


def test_a_damaged_shard_is_made_again(pair: Pair, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pool": "last", "store": tmp_path, "shard_texts": 8, "blocks": [2]}
    before = probing.hidden_states(pair.swarm, TEXTS, **options)[2].clone()
    broken = next(tmp_path.glob("*/shard-00001*"))
    broken.write_bytes(broken.read_bytes()[:500])
    files = shard_files(tmp_path)
    after = probing.hidden_states(pair.swarm, TEXTS, **options)
    same(after[2], before)
    now = shard_files(tmp_path)
    assert [name for name in now if now[name] != files[name]] == [broken.name]


def test_two_writers_and_bad_arguments(pair: Pair, tmp_path: Path) -> None:
    swarm = pair.swarm

    def texts() -> Iterator[str]:
        yield "one"
        with pytest.raises(BlockingIOError, match="another process"):
            probing.hidden_states(swarm, ["two"], store=tmp_path)
        yield "three"

    assert len(probing.hidden_states(swarm, texts(), store=tmp_path)) == 2
    with pytest.raises(ValueError, match=r"texts\[1\].*tokens"):
        probing.hidden_states(swarm, ["a", ""])
    with pytest.raises(sn.errors.BlocksOutOfRange, match=r"5 is not in the model.*0:5"):
        probing.hidden_states(swarm, ["a"], blocks=[5])
    with pytest.raises(ValueError, match="tokenizer"):
        probing.hidden_states(pair.local, ["a"])
    with (
        pytest.raises(ValueError, match=r"vector: shape \[3\]"),
        probing.steer(swarm, 1, torch.zeros(3)),
    ):
        pass
    with pytest.raises(ValueError, match=r"clean has 2 tokens.*corrupted has 3"):
        probing.patch(swarm, "ab", "abc", lambda logits: logits[:, 0])
    with pytest.raises(ValueError, match="rarest"):
        probing.linear_probe({0: torch.zeros(3, 4)}, ["x", "y", "y"])


COLLECT = """
import sys, transformers, torch
from swarm_notebook.probing import hidden_states
folder, store, texts = sys.argv[1], sys.argv[2], sys.argv[3].split("|")
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
def told():
    for number, text in enumerate(texts):
        print(number, flush=True)
        if number == 11:
            sys.stdin.read()
        yield text
hidden_states(model, told(), tokenizer=tokenizer, store=store, pool="last", shard_texts=4)
"""


def test_a_killed_kernel_leaves_whole_shards(folder: Path, pair: Pair, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", COLLECT, str(folder), str(tmp_path), "|".join(TEXTS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == "11":
                child.kill()
    finished = shard_files(tmp_path)
    assert len(finished) == 2
    # A shard that was being written, as a kill would leave it.
    (next(iter(tmp_path.iterdir())) / "shard-00002.safetensors").write_bytes(b"half")
    options: dict[str, Any] = {"store": tmp_path, "pool": "last", "shard_texts": 4}
    resumed = probing.hidden_states(pair.local, TEXTS, tokenizer=pair.tokenizer, **options)
    files = shard_files(tmp_path)
    assert len(files) == 5
    assert {name: files[name] for name in finished} == finished
    same(resumed[3], probing.hidden_states(pair.swarm, TEXTS, pool="last", blocks=[3])[3])


def test_killed_in_the_middle_and_resumed(
    folder: Path, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only server dies for good; finished shards stay, the rest is made when it is back."""
    options: dict[str, Any] = {"pool": "last", "shard_texts": 4, "batch_size": 2}
    done: list[int] = []
    deaths = [5]
    real = states_module._read

    def counted(subject: Any, texts: Any, blocks: Any) -> Any:
        states = real(subject, texts, blocks)
        done.append(len(texts))
        if deaths and len(done) == deaths[0]:
            deaths.clear()
            server.kill()
        return states

    monkeypatch.setattr(states_module, "_read", counted)
    with sn.LocalSwarm(folder, 1, threads=1) as local:
        server = local.servers[0]
        shared.swarms.append(local)
        try:
            swarm = sn.connect(local.initial_peers, model=folder, timeout=2)
            with pytest.raises(sn.SwarmError):
                probing.hidden_states(swarm, TEXTS, store=tmp_path, **options)
            swarm.disconnect()
            finished = shard_files(tmp_path)
            assert len(finished) == 2
            server.launch()
            server.join([])
            server.wait_ready(60)
            done.clear()
            with sn.connect(local.initial_peers, model=folder) as again:
                resumed = probing.hidden_states(again, TEXTS, store=tmp_path, **options)
        finally:
            shared.swarms.remove(local)
    assert sum(done) == len(TEXTS) - 8
    files = shard_files(tmp_path)
    assert {name: when for name, when in files.items() if name in finished} == finished
    undisturbed = probing.hidden_states(pair.swarm, TEXTS, store=tmp_path / "other", **options)
    assert len(shard_files(tmp_path / "other")) == len(files) == 5
    for block in range(BLOCKS):
        same(resumed[block], undisturbed[block])
        same(resumed[block], probing.load_states(tmp_path, TEXTS)[block])


def test_logit_lens(pair: Pair) -> None:
    remote = probing.logit_lens(pair.swarm, "Hello, world", top=3)
    local = probing.logit_lens(pair.local, "Hello, world", top=3, tokenizer=pair.tokenizer)
    assert remote.ids.shape == (BLOCKS, 12, 3)
    assert torch.equal(remote.ids, local.ids)
    same(remote.probabilities, local.probabilities)
    # The last block's row is the model's own prediction.
    ids = pair.tokenizer("Hello, world", return_tensors="pt").input_ids
    with torch.no_grad():
        real = pair.local(ids).logits[0].softmax(-1).topk(3)
    assert torch.equal(remote.ids[-1], real.indices)
    same(remote.probabilities[-1], real.values)
    # An earlier row is what the norm and the head make of that block's state.
    with torch.no_grad():
        state = pair.local.model(ids, output_hidden_states=True).hidden_states[3]
        early = pair.local.lm_head(pair.local.model.norm(state))[0].softmax(-1).topk(3)
    assert torch.equal(remote.ids[2], early.indices)
    assert repr(remote) == repr(local).replace(local.model, remote.model)
    assert repr(remote).splitlines()[1].split()[:3] == ["block", "H", "e"]
    assert "%" in str(remote)
    assert "<table>" in remote._repr_html_()
    assert probing.logit_lens(pair.local, ids, blocks=[1]).blocks == [1]


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma2"])
def test_the_lens_uses_the_end_of_every_architecture(family: str, tmp_path: Path) -> None:
    """Flattened shapes (GPT-2), blocks that return tuples (BLOOM), capped logits (Gemma 2)."""
    folder = tiny_model(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 128, (9,))
    lens = probing.logit_lens(model, ids, top=4)
    with torch.no_grad():
        real = model(ids[None]).logits[0].softmax(-1).topk(4)
    assert torch.equal(lens.ids[-1], real.indices)
    same(lens.probabilities[-1], real.values)


def test_linear_probe(pair: Pair, tmp_path: Path) -> None:
    """A property that is plain in the states is found; a shuffled one is not."""
    texts = [f"{'abc' * (n % 3)}{n:03d}{'xyz'[n % 3]}" for n in range(60)]
    kinds = ["xyz"[n % 3] for n in range(60)]
    states = probing.hidden_states(pair.swarm, texts, pool="last", blocks=[0, 2])
    probes = probing.linear_probe(states, kinds)
    assert list(probes) == [0, 2]
    assert probes.chance == pytest.approx(1 / 3)
    assert probes[0].accuracy > 0.9
    assert probes.best.accuracy == max(probe.accuracy for probe in probes.values())
    assert probes[0].predict(states[0]) == kinds
    noise = [kinds[n] for n in torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert probing.linear_probe(states, noise, blocks=[2])[2].accuracy < 0.6
    again = probing.load_probes(probes.save(tmp_path))
    assert repr(again) == repr(probes)
    assert again[2].predict(states[2]) == probes[2].predict(states[2])
    assert json.loads((tmp_path / MANIFEST_FILE).read_text())["model"] == pair.swarm.name
    assert "0.33" in repr(probes)
    assert "<table>" in probes._repr_html_()


def test_a_probe_of_two_classes_predicts_as_scikit_learn_does() -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(80, 6, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    labels = (states[:, 0] + 0.3 * torch.randn(80, generator=generator) > 3).tolist()
    probe = probing.linear_probe({7: states}, labels)[7]
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    theirs = make_pipeline(StandardScaler(), LogisticRegression()).fit(states.numpy(), labels)
    assert probe.predict(states) == theirs.predict(states.numpy()).tolist()
    assert probe.accuracy > 0.8


def test_patch(pair: Pair) -> None:
    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 40] - logits[:, 50]

    clean, corrupted = "it was black", "it was clean"
    remote = probing.patch(pair.swarm, clean, corrupted, metric, positions=[-5, -2, -1])
    local = probing.patch(
        pair.local, clean, corrupted, metric, positions=[-5, -2, -1], tokenizer=pair.tokenizer
    )
    same(remote.scores, local.scores)
    assert remote.positions == [7, 10, 11]
    # The last position of the last block decides alone; the first position that differs, too,
    # where it enters: nothing before it differs.
    assert remote.restored[-1].tolist() == pytest.approx([0, 0, 1], abs=1e-3)
    assert repr(remote).splitlines()[1].split() == ["block", "c", "a", "n"]
    assert "<table>" in remote._repr_html_()
    # One of them by hand.
    ids = [pair.tokenizer(text, return_tensors="pt").input_ids for text in (clean, corrupted)]
    with torch.no_grad():
        state = pair.local.model(ids[0], output_hidden_states=True).hidden_states[3]

        def restore(module: Any, args: Any, output: torch.Tensor) -> None:
            output[:, 10] = state[:, 10]

        handle = pair.local.model.layers[2].register_forward_hook(restore)
        by_hand = metric(pair.local(ids[1]).logits[:, -1])
        handle.remove()
    assert remote.scores[2, 1].item() == pytest.approx(by_hand.item(), abs=1e-3)


def test_steer(pair: Pair) -> None:
    vector = torch.randn(48, generator=torch.Generator().manual_seed(2))
    ids = pair.tokenizer("once", return_tensors="pt").input_ids
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    told = []
    for target, model in ((pair.swarm, pair.swarm.model), (pair.local, pair.local)):
        plain = model.generate(ids, **options).tolist()
        with probing.steer(target, 2, vector, scale=3):
            steered = model.generate(ids, **options).tolist()
        assert steered != plain
        assert model.generate(ids, **options).tolist() == plain
        told.append(steered)
    assert told[0] == told[1]


def test_a_steering_vector_can_be_trained(pair: Pair) -> None:
    ids = pair.tokenizer("once upon a time", return_tensors="pt").input_ids
    grads = []
    for model in (pair.swarm.model, pair.local):
        vector = torch.zeros(48, requires_grad=True)
        with probing.steer(model, -2, vector):
            model(ids, labels=ids).loss.backward()
        grads.append(vector.grad)
    assert grads[0] is not None
    same(*grads)


@pytest.mark.parametrize("kind", ["prompt", "lora"])
def test_models_wrapped_by_peft(pair: Pair, kind: str, tmp_path: Path) -> None:
    """The states of the text's own tokens, whatever stands in front of them."""
    configs: dict[str, peft.PeftConfig] = {
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "lora": peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["v_proj"]),
    }
    told = []
    plain = probing.hidden_states(pair.swarm, TEXTS[:4], pool="last")[3]
    for model in (pair.swarm.model, pair.local):
        torch.manual_seed(3)
        wrapped: Any = peft.get_peft_model(model, configs[kind])
        options: dict[str, Any] = {"tokenizer": pair.tokenizer}
        try:
            with pytest.raises(ValueError, match="tag"):
                probing.hidden_states(wrapped, TEXTS[:4], store=tmp_path, **options)
            states = probing.hidden_states(wrapped, TEXTS[:4], pool="last", **options)
            lens = probing.logit_lens(wrapped, "abc", **options)
            patching = probing.patch(wrapped, "abc", "abd", lambda logits: logits[:, 40], **options)
            told.append((states[3], lens.probabilities, patching.scores))
        finally:
            if kind == "lora":
                wrapped.unload()
    assert lens.words == ["a", "b", "c"]
    for ours, theirs in zip(*told, strict=True):
        same(ours, theirs)
    assert (told[0][0] - plain).abs().max() > 1e-2
