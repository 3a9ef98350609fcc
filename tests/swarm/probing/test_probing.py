"""Lens, probes, patching and steering on a remote model, each against the local model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.letter_tokenizer import LetteredPair
from support.pairs import close
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

from swarm_notebook import probing
from swarm_notebook.errors import Unsupported
from swarm_notebook.tuning import MANIFEST_FILE

BLOCKS = 5
SENTENCES = ("it was black", "it was clean")


@pytest.fixture(scope="module")
def pair(lettered_pair: LetteredPair) -> LetteredPair:
    return lettered_pair


def test_logit_lens(pair: LetteredPair) -> None:
    remote = probing.logit_lens(pair.swarm, "Hello, world", top=3)
    local = probing.logit_lens(pair.local, "Hello, world", top=3, tokenizer=pair.tokenizer)
    assert remote.ids.shape == (BLOCKS, 12, 3)
    assert torch.equal(remote.ids, local.ids)
    close(remote.probabilities, local.probabilities)
    # The last block's row is the model's own prediction.
    ids = pair.tokenizer("Hello, world", return_tensors="pt").input_ids
    with torch.no_grad():
        real = pair.local(ids).logits[0].softmax(-1).topk(3)
    assert torch.equal(remote.ids[-1], real.indices)
    close(remote.probabilities[-1], real.values)
    # An earlier row is what the norm and the head make of that block's state.
    with torch.no_grad():
        state = pair.local.model(ids, output_hidden_states=True).hidden_states[3]
        early = pair.local.lm_head(pair.local.model.norm(state))[0].softmax(-1).topk(3)
    assert torch.equal(remote.ids[2], early.indices)
    assert repr(remote) == repr(local).replace(local.model, remote.model)
    assert repr(remote).splitlines()[1].split()[:3] == ["block", "H", "e"]
    assert "%" in str(remote)
    assert "<table" in remote._repr_html_()
    assert probing.logit_lens(pair.local, ids, blocks=[1]).blocks == [1]


def test_entropy_and_ranks(pair: LetteredPair) -> None:
    lens = probing.logit_lens(pair.swarm, "Hello, world", last=4)
    assert (lens.words, lens.first, lens.entropy.shape) == (list("orld"), 8, (BLOCKS, 4))
    whole = probing.logit_lens(pair.swarm, "Hello, world", blocks=[0, 3])
    assert torch.equal(whole.ids[1, 8:], lens.ids[3])
    ids = pair.tokenizer("Hello, world", return_tensors="pt").input_ids
    with torch.no_grad():
        passed = pair.local(ids, output_hidden_states=True)
    close(lens.states[3], passed.hidden_states[4][0, -4:])
    logits = passed.logits[0, -4:]
    close(lens.entropy[-1], torch.distributions.Categorical(logits=logits).entropy() / math.log(2))
    token = int(logits[2].argsort(descending=True)[6])
    ranks = probing.token_ranks(pair.swarm, lens.states, token)
    assert ranks.shape == lens.entropy.shape
    assert ranks[-1, 2] == 7


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
    close(lens.probabilities[-1], real.values)


def test_linear_probe(pair: LetteredPair, tmp_path: Path) -> None:
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
    assert probes.predict(texts[:5], block=0) == kinds[:5]
    found = probes.confusion(0)
    assert found.counts.sum(1).tolist() == [20, 20, 20]
    assert found.counts.diagonal().sum() / 60 == pytest.approx(probes[0].accuracy)
    assert found.to_pandas().loc["x", "x"] == found.counts[0, 0]
    assert "true \\ predicted" in repr(found)
    assert list(probes.to_pandas()["accuracy"]) == [probes[0].accuracy, probes[2].accuracy]
    picture = probes.plot().save(tmp_path / "accuracy.svg").read_text()
    assert "majority baseline 0.33" in picture
    assert picture.count("<circle") == 2
    noise = [kinds[n] for n in torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert probing.linear_probe(states, noise, blocks=[2])[2].accuracy < 0.6
    again = probing.load_probes(probes.save(tmp_path))
    assert repr(again) == repr(probes)
    assert torch.equal(again.confusion(0).counts, found.counts)
    with pytest.raises(ValueError, match="do not know how their states were collected"):
        again.predict(texts)
    assert again[2].predict(states[2]) == probes[2].predict(states[2])
    assert json.loads((tmp_path / MANIFEST_FILE).read_text())["model"] == pair.swarm.name
    assert "0.33" in repr(probes)
    assert "<svg" in probes._repr_html_()
    assert "<table" in found._repr_html_()


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


def margin(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 40] - logits[:, 50]


def test_patch(pair: LetteredPair) -> None:
    remote = probing.patch(pair.swarm, *SENTENCES, margin, positions=[-5, -2, -1])
    local = probing.patch(
        pair.local, *SENTENCES, margin, positions=[-5, -2, -1], tokenizer=pair.tokenizer
    )
    close(remote.scores, local.scores)
    assert remote.positions == [7, 10, 11]
    # The last position of the last block decides alone; the first position that differs, too,
    # where it enters: nothing before it differs.
    assert remote.restored[-1].tolist() == pytest.approx([0, 0, 1], abs=1e-3)
    assert repr(remote).splitlines()[1].split() == ["block", "c", "a", "n"]
    assert "<table" in remote._repr_html_()
    # Without positions, from the first token that differs.
    whole = probing.patch(pair.swarm, *SENTENCES, margin, blocks=2)
    assert (whole.blocks, whole.positions) == ([2], [7, 8, 9, 10, 11])
    assert list(whole.to_pandas()["position"]) == whole.positions
    close(whole.scores[0, [0, 3, 4]], remote.scores[2])
    # One of them by hand.
    ids = [pair.tokenizer(text, return_tensors="pt").input_ids for text in SENTENCES]
    with torch.no_grad():
        state = pair.local.model(ids[0], output_hidden_states=True).hidden_states[3]

        def restore(module: Any, args: Any, output: torch.Tensor) -> None:
            output[:, 10] = state[:, 10]

        handle = pair.local.model.layers[2].register_forward_hook(restore)
        by_hand = margin(pair.local(ids[1]).logits[:, -1])
        handle.remove()
    assert remote.scores[2, 1].item() == pytest.approx(by_hand.item(), abs=1e-3)


def test_path_patch(pair: LetteredPair) -> None:
    remote = probing.path_patch(pair.swarm, *SENTENCES, margin, receivers=[1, 3])
    local = probing.path_patch(
        pair.local, *SENTENCES, margin, receivers=[1, 3], tokenizer=pair.tokenizer
    )
    assert (remote.senders, remote.receivers) == ([0, 1, 2, 3, 4], [1, 3, "logits"])
    assert remote.scores.isnan().int().tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0] * 5]
    close(remote.scores.nan_to_num(), local.scores.nan_to_num())
    assert len(remote.to_pandas()) == 9
    assert "<table" in remote._repr_html_()
    assert repr(remote).splitlines()[1].split()[:3] == ["receiver", "from", "0"]
    # From block 1 to block 3 by hand, as it is defined: everything frozen but the two.
    layers = pair.local.model.layers
    ids = [pair.tokenizer(text, return_tensors="pt").input_ids for text in SENTENCES]
    with torch.no_grad():
        good, bad = (pair.local(one, output_hidden_states=True).hidden_states for one in ids)

        def frozen(block: int, states: tuple[torch.Tensor, ...]) -> Any:
            def write(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
                return args[0] + states[block + 1] - states[block]

            return layers[block].register_forward_hook(write)

        got: list[torch.Tensor] = []
        handles = [frozen(1, good), frozen(2, bad)]
        handles.append(
            layers[3].register_forward_hook(lambda _, args, out: got.append(out - args[0]))
        )
        pair.local(ids[1])
        for handle in handles:
            handle.remove()
        handle = layers[3].register_forward_hook(lambda _, args, out: args[0] + got[0])
        by_hand = margin(pair.local(ids[1]).logits[:, -1])
        handle.remove()
    assert remote.scores[1, 1].item() == pytest.approx(by_hand.item(), abs=1e-3)


@pytest.mark.works("Probing: single heads patched, at home")
def test_patch_heads(pair: LetteredPair) -> None:
    with pytest.raises(Unsupported, match=r"swarm\.own"):
        probing.patch_heads(pair.swarm, *SENTENCES, margin, blocks=1)
    pair.swarm.own([1, 3])
    try:
        remote = probing.patch_heads(pair.swarm, *SENTENCES, margin, blocks=[1, 3])
    finally:
        pair.swarm.release()
    local = probing.patch_heads(
        pair.local, *SENTENCES, margin, blocks=[1, 3], tokenizer=pair.tokenizer
    )
    close(remote.scores, local.scores)
    heads = pair.local.config.num_attention_heads
    assert remote.scores.shape == (2, heads)
    assert len(remote.to_pandas()) == 2 * heads
    assert "<table" in remote._repr_html_()
    assert repr(remote).splitlines()[1].split()[:3] == ["block", "h0", "h1"]
    named = probing.patch_heads(
        pair.local,
        *(pair.tokenizer(text).input_ids for text in SENTENCES),
        margin,
        blocks=[1, 3],
        projection="self_attn.o_proj",
    )
    assert torch.equal(named.scores, local.scores)
    with pytest.raises(ValueError, match=r"its linear layers: .*o_proj"):
        probing.patch_heads(pair.local, [40, 41], [40, 42], margin, projection="out")
    # One of them by hand.
    layer = pair.local.model.layers[3].self_attn.o_proj
    texts = [pair.tokenizer(text, return_tensors="pt").input_ids for text in SENTENCES]
    read: list[torch.Tensor] = []
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        pair.local(texts[0])
        handle.remove()
        width = read[0].shape[-1] // heads

        def restore(_module: Any, args: Any) -> None:
            args[0][:, 7:, width : 2 * width] = read[0][:, 7:, width : 2 * width]

        handle = layer.register_forward_pre_hook(restore)
        by_hand = margin(pair.local(texts[1]).logits[:, -1])
        handle.remove()
    assert remote.scores[1, 1].item() == pytest.approx(by_hand.item(), abs=1e-3)


@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt2", "attn.c_proj"), ("bloom", "self_attention.dense"), ("qwen3", "self_attn.o_proj")],
)
def test_what_reads_the_heads_is_found_in_every_architecture(
    family: str, name: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family, tmp_path)).eval()
    texts = [40, 41, 42], [40, 43, 42]
    found = probing.patch_heads(model, *texts, lambda logits: logits[:, 7])
    named = probing.patch_heads(model, *texts, lambda logits: logits[:, 7], projection=name)
    assert torch.equal(found.scores, named.scores)


@pytest.mark.works("Probing: attention patterns, of blocks at home")
def test_attention_patterns(pair: LetteredPair) -> None:
    with pytest.raises(Unsupported, match=r"swarm\.own"):
        probing.attention_patterns(pair.swarm, "it was", blocks=1)
    pair.swarm.own([1, 3])
    try:
        remote = probing.attention_patterns(pair.swarm, "it was", blocks=[1, 3])
    finally:
        pair.swarm.release()
    local = probing.attention_patterns(
        pair.local, "it was", blocks=[1, 3], tokenizer=pair.tokenizer
    )
    close(remote.weights, local.weights)
    model = copy.deepcopy(pair.local)
    model.set_attn_implementation("eager")
    ids = pair.tokenizer("it was", return_tensors="pt").input_ids
    with torch.no_grad():
        real = model(ids, output_attentions=True).attentions
    close(local.weights, torch.stack([real[block][0] for block in (1, 3)]))
    # Afterwards everything is as it was.
    implementations = {pair.swarm.model.config._attn_implementation}
    assert implementations | {pair.local.config._attn_implementation} == {"sdpa"}
    heads = pair.local.config.num_attention_heads
    assert repr(remote).splitlines()[2].split()[0] == "3.0"
    assert len(repr(remote).splitlines()) == 2 + 2 * heads
    assert len(remote.to_pandas()) == 2 * heads * 21
    one = remote.head(3, 1)
    close(one.weights.sum(-1), torch.ones(6))
    assert "<table" in one._repr_html_()
    assert "<table" in remote._repr_html_()
    assert repr(one).splitlines()[1].split()[:3] == ["from", "i", "t"]
    with pytest.raises(LookupError, match=r"blocks \[1, 3\]"):
        remote.head(2, 0)


@pytest.mark.works("Probing: `steer`, `patch`, linear probes, the logit lens")
def test_steer(pair: LetteredPair) -> None:
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


def test_a_sweep_over_strengths(pair: LetteredPair) -> None:
    direction = torch.randn(48, generator=torch.Generator().manual_seed(2))
    vector = probing.SteeringVector("tiny", 2, direction)
    strengths = [-3.0, 0.0, 3.0]
    swept = vector.sweep(pair.swarm, "once", strengths, max_new_tokens=6)
    assert swept.strengths == strengths
    ids = pair.tokenizer("once", return_tensors="pt").input_ids
    for scale, text in zip(swept.strengths, swept.texts, strict=True):
        with vector.steer(pair.local, scale=scale):
            made = pair.local.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert text == pair.tokenizer.decode(made, skip_special_tokens=True)
    assert list(swept.to_pandas()["strength"]) == strengths
    assert repr(swept).splitlines()[2].split()[0] == "-3"
    assert swept._repr_html_().count("snh-prose") >= len(strengths)
    with pytest.raises(ValueError, match="strengths"):
        vector.sweep(pair.swarm, "once", [])


def test_a_steering_vector_from_contrast_pairs(pair: LetteredPair, tmp_path: Path) -> None:
    texts = ["so good", "fine", "so bad", "poor"]
    made = probing.steering_vector(pair.swarm, texts[:2], texts[2:], block=-3)
    states = probing.hidden_states(pair.swarm, texts, blocks=2, pool="last")[2]
    close(made.vector, states[:2].mean(0) - states[2:].mean(0))
    again = probing.load_vector(made.save(tmp_path / "good.safetensors"))
    assert (again.block, again.model, repr(again)) == (2, pair.swarm.name, repr(made))
    ids = pair.tokenizer("once", return_tensors="pt").input_ids
    with torch.no_grad():
        with again.steer(pair.swarm, 3):
            ours = pair.swarm.model(ids).logits
        with probing.steer(pair.local, 2, made.vector, scale=3):
            close(ours, pair.local(ids).logits)
    with pytest.raises(ValueError, match="at least one text"):
        probing.steering_vector(pair.swarm, [], texts, block=2)


def test_a_steering_vector_can_be_trained(pair: LetteredPair) -> None:
    ids = pair.tokenizer("once upon a time", return_tensors="pt").input_ids
    grads = []
    for model in (pair.swarm.model, pair.local):
        vector = torch.zeros(48, requires_grad=True)
        with probing.steer(model, -2, vector):
            model(ids, labels=ids).loss.backward()
        grads.append(vector.grad)
    assert grads[0] is not None
    close(*grads)


@pytest.mark.parametrize("kind", ["prompt", "lora"])
def test_models_wrapped_by_peft(pair: LetteredPair, kind: str, tmp_path: Path) -> None:
    """The states of the text's own tokens, whatever stands in front of them."""
    configs: dict[str, peft.PeftConfig] = {
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "lora": peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["v_proj"]),
    }
    texts = ["one", "and two", "three", "four"]
    told = []
    plain = probing.hidden_states(pair.swarm, texts, pool="last")[3]
    for model in (pair.swarm.model, pair.local):
        torch.manual_seed(3)
        wrapped: Any = peft.get_peft_model(model, configs[kind])
        options: dict[str, Any] = {"tokenizer": pair.tokenizer}
        try:
            with pytest.raises(ValueError, match="tag"):
                probing.hidden_states(wrapped, texts, store=tmp_path, **options)
            states = probing.hidden_states(wrapped, texts, pool="last", **options)
            lens = probing.logit_lens(wrapped, "abc", **options)
            patching = probing.patch(wrapped, "abc", "abd", lambda logits: logits[:, 40], **options)
            told.append((states[3], lens.probabilities, patching.scores))
        finally:
            if kind == "lora":
                wrapped.unload()
    assert lens.words == ["a", "b", "c"]
    for ours, theirs in zip(*told, strict=True):
        close(ours, theirs)
    assert (told[0][0] - plain).abs().max() > 1e-2


def test_bad_arguments(pair: LetteredPair) -> None:
    swarm = pair.swarm
    with (
        pytest.raises(ValueError, match=r"vector: shape \[3\]"),
        probing.steer(swarm, 1, torch.zeros(3)),
    ):
        pass
    with pytest.raises(ValueError, match=r"clean has 2 tokens.*corrupted has 3"):
        probing.patch(swarm, "ab", "abc", lambda logits: logits[:, 0])
    states = probing.hidden_states(swarm, ["one"], blocks=2, pool="last")
    assert "1 text, block 2," in repr(states)
    with pytest.raises(ValueError, match="the text is empty"):
        probing.hidden_states(swarm, [""])
    with pytest.raises(ValueError, match="got 2 labels for 1 text"):
        probing.linear_probe(states, ["x", "y"])
    with pytest.raises(ValueError, match="rarest"):
        probing.linear_probe({0: torch.zeros(3, 4)}, ["x", "y", "y"])
