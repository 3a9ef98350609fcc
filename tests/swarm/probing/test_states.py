"""Hidden states in a store: equal to the local model's, whatever happens on the way.

The only server is killed in the middle, so is the notebook's process; the store is damaged,
extended, read by another process, written by two.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forkserver import WARM
from support.letter_tokenizer import LetteredPair
from support.pairs import close
from support.patience import PATIENCE
from support.processes import lasting_swarms

import swarm_notebook as sn
from swarm_notebook import probing
from swarm_notebook.probing import states as states_module
from swarm_notebook.tuning import DeepPrompts

BLOCKS = 5
TEXTS = [f"{'the quick brown fox'[: 4 + n % 13]} {n}" for n in range(20)]


@pytest.fixture(scope="module")
def pair(lettered_pair: LetteredPair) -> LetteredPair:
    return lettered_pair


def shard_files(store: Path) -> dict[str, int]:
    """The shards of a store, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(store.glob("*/shard-*"))}


@pytest.mark.parametrize("pool", [None, "last", "mean"])
def test_hidden_states(pair: LetteredPair, pool: Any, tmp_path: Path) -> None:
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
                close(states.text(number, block), expected)
    if pool is None:
        with pytest.raises(ValueError, match="per token"):
            remote[3]
    else:
        assert remote[3].shape == (len(TEXTS), 48)
        close(remote[4], local[4])
    assert len(shard_files(tmp_path)) == 3
    assert remote.manifest is not None
    assert remote.manifest["blocks"] == BLOCKS


def test_a_store_grows_by_what_is_missing(pair: LetteredPair, tmp_path: Path) -> None:
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
        close(states[block], expected[block])
    # Nothing is asked any more; another dtype, pooling or tag is kept apart.
    probing.hidden_states(pair.swarm, order, blocks=[1], **options)
    assert shard_files(tmp_path) == files
    half = probing.hidden_states(pair.swarm, order, dtype=torch.float16, tag="half", **options)
    assert half[1].dtype == torch.float16
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.works("Probing: `hidden_states(store=…)` of a model that has changed")
def test_a_model_that_has_changed_gets_no_old_states(pair: LetteredPair, tmp_path: Path) -> None:
    """Steering, deep prompts, weights of a block at home: each finds its own states again."""
    swarm, home = pair.swarm, tmp_path / "store"
    options: dict[str, Any] = {"pool": "last", "blocks": [2, -1]}

    @contextmanager
    def prompted() -> Iterator[None]:
        torch.manual_seed(0)
        prompts = DeepPrompts(swarm.model, 3, std=0.5)
        yield
        prompts.remove()

    @contextmanager
    def edited() -> Iterator[None]:
        swarm.own(1)
        weight = swarm.model.get_parameter("model.layers.1.mlp.down_proj.weight")
        with torch.no_grad():
            weight.mul_(1.5)
        yield
        swarm.release(1)

    def steered() -> Any:
        return probing.steer(swarm, 1, torch.ones(48), scale=0.5)

    seen = []
    for changed in (nullcontext, steered, prompted, edited):
        for _ in range(2):
            with changed():
                stored = probing.hidden_states(swarm, TEXTS[:4], store=home, **options)
                expected = probing.hidden_states(swarm, TEXTS[:4], **options)
            for block in stored.blocks:
                close(stored[block], expected[block])
        seen.append(stored[4])
    assert all(not torch.allclose(one, seen[0], atol=1e-2) for one in seen[1:])
    assert len(shard_files(home)) == 1  # one of this name in each folder
    assert len(list(home.iterdir())) == len(seen)
    with pytest.raises(ValueError, match="by different models"):
        probing.load_states(home)


@pytest.mark.refused(
    "Probing: a store for states under hooks of your own", "name what they do: `tag=…`"
)
def test_states_under_a_hook_are_not_stored(
    pair: LetteredPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"pool": "last", "blocks": [-1], "store": tmp_path}
    before = probing.hidden_states(pair.swarm, TEXTS[:3], **options)[4]
    layer = pair.swarm.model.get_submodule("model.layers.2")
    hook = layer.register_forward_hook(lambda _module, _inputs, output: output * 2)
    under = probing.hidden_states(pair.swarm, TEXTS[:3], **options)[4]
    tagged = probing.hidden_states(pair.swarm, TEXTS[:3], tag="doubled", **options)[4]
    hook.remove()
    assert "model.layers.2 has a forward hook" in caplog.text
    close(under, tagged)
    assert not torch.allclose(under, before, atol=1e-2)
    close(probing.hidden_states(pair.swarm, TEXTS[:3], **options)[4], before)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_store_is_read_back_by_another_process(pair: LetteredPair, tmp_path: Path) -> None:
    states = probing.hidden_states(pair.swarm, TEXTS, pool="mean", store=tmp_path, shard_texts=8)
    code = (
        "import sys, torch; from swarm_notebook.probing import load_states\n"
        "states = load_states(sys.argv[1], pool='mean')\n"
        "print(states); torch.save(states[2], sys.argv[2])\n"
        "assert states.manifest['route'], states.manifest"
    )
    matrix = tmp_path.with_suffix(".pt")
    done = subprocess.run(
        [*WARM, code, str(tmp_path), str(matrix)],
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


def test_a_damaged_shard_is_made_again(pair: LetteredPair, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pool": "last", "store": tmp_path, "shard_texts": 8, "blocks": [2]}
    before = probing.hidden_states(pair.swarm, TEXTS, **options)[2].clone()
    broken = next(tmp_path.glob("*/shard-00001*"))
    broken.write_bytes(broken.read_bytes()[:500])
    files = shard_files(tmp_path)
    after = probing.hidden_states(pair.swarm, TEXTS, **options)
    close(after[2], before)
    now = shard_files(tmp_path)
    assert [name for name in now if now[name] != files[name]] == [broken.name]


def test_one_text_is_one_text_and_not_its_letters(pair: LetteredPair, tmp_path: Path) -> None:
    alone = probing.hidden_states(pair.swarm, "abc", store=tmp_path)
    assert torch.equal(alone.text(0, 1), probing.hidden_states(pair.swarm, ["abc"]).text(0, 1))
    assert len(alone) == len(probing.load_states(tmp_path, "abc")) == 1


def test_two_writers_and_bad_arguments(pair: LetteredPair, tmp_path: Path) -> None:
    swarm = pair.swarm

    def texts() -> Iterator[str]:
        yield "one"
        with pytest.raises(BlockingIOError, match="another process"):
            probing.hidden_states(swarm, ["two"], store=tmp_path)
        yield "three"

    assert len(probing.hidden_states(swarm, texts(), store=tmp_path)) == 2
    with pytest.raises(ValueError, match=r"texts\[1\].*empty"):
        probing.hidden_states(swarm, ["a", ""])
    with pytest.raises(
        sn.errors.BlocksOutOfRange, match=r"blocks: 5; the model has 5 blocks, 0 to 4"
    ):
        probing.hidden_states(swarm, ["a"], blocks=[5])
    with pytest.raises(ValueError, match="tokenizer"):
        probing.hidden_states(pair.local, ["a"])


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


def test_a_killed_kernel_leaves_whole_shards(pair: LetteredPair, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*WARM, COLLECT, str(pair.folder), str(tmp_path), "|".join(TEXTS)],
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
    close(resumed[3], probing.hidden_states(pair.swarm, TEXTS, pool="last", blocks=[3])[3])


def test_killed_in_the_middle_and_resumed(
    pair: LetteredPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    with sn.LocalSwarm(pair.folder, 1, threads=1) as local:
        server = local.servers[0]
        lasting_swarms.append(local)
        try:
            swarm = sn.connect(local.initial_peers, model=pair.folder, timeout=2)
            with pytest.raises(sn.SwarmError):
                probing.hidden_states(swarm, TEXTS, store=tmp_path, **options)
            swarm.disconnect()
            finished = shard_files(tmp_path)
            assert len(finished) == 2
            server.launch()
            server.join([])
            server.wait_ready(PATIENCE)
            done.clear()
            with sn.connect(local.initial_peers, model=pair.folder) as again:
                resumed = probing.hidden_states(again, TEXTS, store=tmp_path, **options)
        finally:
            lasting_swarms.remove(local)
    assert sum(done) == len(TEXTS) - 8
    files = shard_files(tmp_path)
    assert {name: when for name, when in files.items() if name in finished} == finished
    undisturbed = probing.hidden_states(pair.swarm, TEXTS, store=tmp_path / "other", **options)
    assert len(shard_files(tmp_path / "other")) == len(files) == 5
    for block in range(BLOCKS):
        close(resumed[block], undisturbed[block])
        close(resumed[block], probing.load_states(tmp_path, TEXTS)[block])
