"""Tools of the ecosystem on a remote model, unmodified, used as their own documentation shows.

Each is run on the remote model and on the same model held locally: what they say must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnsight
import peft
import pytest
import torch
import transformers
from support.letter_tokenizer import LetteredPair
from support.pairs import local_model
from torch._subclasses.fake_tensor import FakeTensorMode

from swarm_notebook.errors import Unsupported

BLOCKS = 5
TARGET = 40


def same(pair: LetteredPair, use: Callable[[Any], list[torch.Tensor]]) -> list[torch.Tensor]:
    """What a tool says of both models is equal; returns it."""
    ours, theirs = use(pair.remote), use(local_model(pair.folder))
    assert len(ours) == len(theirs) > 0
    for mine, local in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, local, atol=1e-4, rtol=1e-4, equal_nan=True)
    return ours


def ids(pair: LetteredPair) -> torch.Tensor:
    return pair.tokenizer("hello there", return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def pair(lettered_pair: LetteredPair) -> LetteredPair:
    return lettered_pair


CONFIGS: dict[str, peft.PeftConfig] = {
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "mlp.up_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.works("Tools: transformers' Trainer")
def test_trainer(pair: LetteredPair, kind: str, tmp_path: Path) -> None:
    """The losses, gradient norms and evaluation of a run; its checkpoint loads locally."""
    texts = [f"{number} plus {number} is {2 * number}" for number in range(16)]
    data = [{"input_ids": pair.tokenizer(text)["input_ids"]} for text in texts]

    def train(model: Any, folder: Path) -> tuple[list[float], float]:
        torch.manual_seed(0)
        wrapped: Any = peft.get_peft_model(model, CONFIGS[kind])
        options = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=0.05,
            label_smoothing_factor=0.1 if kind == "lora" else 0,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=wrapped,
            args=options,
            train_dataset=data,
            eval_dataset=data[:8],
            data_collator=transformers.DataCollatorForLanguageModeling(pair.tokenizer, mlm=False),
        )
        trainer.train()
        history = trainer.state.log_history
        told = [entry[name] for entry in history for name in ("loss", "grad_norm") if name in entry]
        evaluated = trainer.evaluate()["eval_loss"]
        if kind == "lora":
            wrapped.unload()
        return told, evaluated

    (ours, our_end), (theirs, their_end) = (
        train(pair.remote, tmp_path / "remote"),
        train(local_model(pair.folder), tmp_path / "local"),
    )
    assert len(ours) == 8
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert our_end == pytest.approx(their_end, rel=1e-4)
    assert ours[-2] < ours[0]
    logits = []
    for place in ("remote", "local"):
        saved = tmp_path / place / "checkpoint-4"
        loaded: Any = peft.PeftModel.from_pretrained(local_model(pair.folder), saved)
        with torch.no_grad():
            logits.append(loaded(ids(pair)).logits)
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)


@pytest.mark.works("Tools: transformers' pipelines")
def test_pipeline(pair: LetteredPair, caplog: pytest.LogCaptureFixture) -> None:
    def use(model: Any) -> list[torch.Tensor]:
        generator: Any = transformers.pipeline(
            "text-generation", model=model, tokenizer=pair.tokenizer
        )
        answers = generator(
            ["hello", "a"], max_new_tokens=4, min_new_tokens=4, do_sample=False, batch_size=2
        )
        return [
            pair.tokenizer(a[0]["generated_text"], return_tensors="pt").input_ids for a in answers
        ]

    same(pair, use)
    assert "not supported" not in caplog.text


@pytest.mark.works("Tools: nnsight, on blocks")
def test_nnsight_reads_and_writes(pair: LetteredPair) -> None:
    def use(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        with traced.trace(ids(pair)):
            before = traced.model.layers[1].output.clone().save()
            traced.model.layers[2].output[:, 1] = 0
            entering = traced.model.layers[3].input.save()
            traced.model.layers[4].output = traced.model.layers[4].output * 2
            logits = traced.output.logits.save()
        return [before, entering, logits]

    before, entering, _ = same(pair, use)
    assert not entering[:, 1].any()
    assert before[:, 1].any()


@pytest.mark.works("Tools: nnsight, outputs of modules inside remote blocks")
def test_nnsight_reads_inside_of_blocks(pair: LetteredPair) -> None:
    def once(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        with traced.trace(ids(pair)):
            attention = traced.model.layers[1].self_attn.output[0].save()
            mlp = traced.model.layers[1].mlp.output.save()
            after = traced.model.layers[1].output.clone().save()
            traced.model.layers[2].output[:, 1] = 0
            projected = traced.model.layers[3].mlp.down_proj.output.save()
            logits = traced.output.logits.save()
        return [attention, mlp, after, projected, logits]

    def steps(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        with traced.trace(ids(pair), fn=model.generate, **options) as run:
            states = nnsight.save([])
            for _ in run.iter[1:3]:
                states.append(traced.model.layers[2].mlp.output.clone())
        return states

    def blocks(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        with traced.trace(ids(pair)) as run:
            kept = run.cache(modules=[traced.model.layers[1], traced.model.layers[3]]).save()
        return [kept[f"model.model.layers.{block}"].output for block in (1, 3)]

    for use in (once, steps, blocks):
        same(pair, use)


@pytest.mark.refused(
    "Tools: nnsight, all else inside remote blocks (inputs, writes, `tracer.cache` of everything)",
    "name blocks, or `swarm.own(block)`",
)
def test_nnsight_is_refused_what_is_not_there(pair: LetteredPair) -> None:
    traced: Any = nnsight.NNsight(pair.remote)

    def read_an_input() -> None:
        with traced.trace(ids(pair)):
            traced.model.layers[1].mlp.input.save()

    def write() -> None:
        with traced.trace(ids(pair)):
            traced.model.layers[1].mlp.output = traced.model.layers[1].mlp.output * 2

    def keep_everything() -> None:
        with traced.trace(ids(pair)) as run:
            run.cache()

    for use, words in (
        (read_an_input, r"asks for .*1\.mlp\.input.* swarm\.own"),
        (write, r"writes to .*1\.mlp\.output.* swarm\.own"),
        (keep_everything, r"tracer\.cache asks for .* swarm\.own"),
    ):
        with pytest.raises(Unsupported, match=words):
            use()
    same(pair, lambda model: [model(ids(pair)).logits.detach()])


def test_shapes_without_values(pair: LetteredPair) -> None:
    """As nnsight's `scan` of a whole model asks for them: the servers are asked nothing."""
    found = []
    for model in (pair.remote, local_model(pair.folder)):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            given = fake.from_tensor(ids(pair))
            mask = fake.from_tensor(torch.ones_like(ids(pair)))
            out = model(given, attention_mask=mask, output_hidden_states=True)
        found.append((out.logits.shape, [state.shape for state in out.hidden_states]))
    assert found[0] == found[1]


def test_nnsight_skips_a_block(pair: LetteredPair) -> None:
    def use(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        with traced.trace(ids(pair), use_cache=False):
            traced.model.layers[1].skip(traced.model.layers[1].input)
            logits = traced.lm_head.output.save()
        return [logits]

    same(pair, use)


@pytest.mark.works("Tools: nnsight, gradients")
def test_nnsight_gradients(pair: LetteredPair) -> None:
    def use(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        with traced.trace(ids(pair)):
            embedded = traced.model.embed_tokens.output
            embedded.requires_grad_(True)
            middle = traced.model.layers[2].output
            logits = traced.output.logits
            with logits[:, -1, TARGET].sum().backward():
                at_middle = middle.grad.save()
                middle.grad = middle.grad * 2
                at_embeddings = embedded.grad.save()
        return [at_middle, at_embeddings]

    same(pair, use)


def test_nnsight_over_generation_steps(pair: LetteredPair) -> None:
    def use(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        with traced.trace(ids(pair), fn=model.generate, **options) as tracer:
            states = nnsight.save([])
            for step in tracer.iter[:4]:
                states.append(traced.model.layers[1].output.clone())
                if step > 1:
                    traced.model.layers[3].output[:] = traced.model.layers[3].output * -1.5
            tokens = tracer.result.save()
        return [tokens, *states]

    tokens, *states = same(pair, use)
    assert [state.shape[1] for state in states] == [ids(pair).shape[1], 1, 1, 1]
    plain = pair.remote.generate(ids(pair), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.tolist() != plain.tolist()


def test_captum_on_embeddings(pair: LetteredPair) -> None:
    from captum.attr import IntegratedGradients, LayerIntegratedGradients

    def use(model: Any) -> list[torch.Tensor]:
        embed = model.get_input_embeddings()
        embedded = embed(ids(pair))
        gradients = IntegratedGradients(lambda x: model(inputs_embeds=x).logits[:, -1])
        found, delta = gradients.attribute(
            embedded,
            baselines=torch.zeros_like(embedded),
            target=TARGET,
            n_steps=10,
            return_convergence_delta=True,
        )
        by_layer = LayerIntegratedGradients(lambda ids: model(ids).logits[:, -1], embed)
        of_tokens = by_layer.attribute(
            ids(pair), baselines=torch.zeros_like(ids(pair)), target=TARGET, n_steps=10
        )
        return [found, delta, of_tokens]

    found, *_ = same(pair, use)
    assert found.abs().max() > 1e-3


@pytest.mark.works("Tools: captum, on embeddings and blocks")
def test_captum_on_blocks(pair: LetteredPair) -> None:
    from captum.attr import LayerActivation, LayerGradientXActivation, LayerIntegratedGradients

    def use(model: Any) -> list[torch.Tensor]:
        # captum wants the gradient at a block: something before it must ask for one.
        model.get_input_embeddings().requires_grad_(True)
        try:

            def last(ids: torch.Tensor) -> torch.Tensor:
                return model(ids).logits[:, -1]

            block = model.model.layers[2]
            integrated = LayerIntegratedGradients(last, model.model.layers[1]).attribute(
                ids(pair), baselines=torch.zeros_like(ids(pair)), target=TARGET, n_steps=10
            )
            return [
                LayerActivation(last, block).attribute(ids(pair)),
                LayerGradientXActivation(last, block).attribute(ids(pair), target=TARGET),
                integrated,
            ]
        finally:
            model.get_input_embeddings().requires_grad_(False)

    for found in same(pair, use):
        assert found.abs().max() > 1e-3


@pytest.mark.works("Tools: captum for language models")
def test_captum_for_language_models(pair: LetteredPair) -> None:
    from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

    def use(model: Any) -> list[torch.Tensor]:
        attribution = LLMAttribution(FeatureAblation(model), pair.tokenizer)
        # Its way through the cache is written for transformers 4: on 5 it feeds all tokens again.
        found = attribution.attribute(
            TextTokenInput("abc de", pair.tokenizer), target="fg", use_cached_outputs=False
        )
        return [found.seq_attr, found.token_attr]

    same(pair, use)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize("method", ["saliency", "layer_gradient_x_activation"])
@pytest.mark.works("Tools: inseq")
def test_inseq(pair: LetteredPair, method: str) -> None:
    import inseq

    def use(model: Any) -> list[torch.Tensor]:
        layer = {"target_layer": model.model.layers[2]} if method.startswith("layer") else {}
        attributed: Any = inseq.load_model(model, method, tokenizer=pair.tokenizer, **layer)
        found = attributed.attribute(
            "hello you",
            generation_args={"max_new_tokens": 3, "min_new_tokens": 3},
            show_progress=False,
        )
        return [found.sequence_attributions[0].target_attributions]

    (found,) = same(pair, use)
    assert found.nan_to_num().abs().max() > 0


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.works("Tools: lm-evaluation-harness")
def test_lm_eval(pair: LetteredPair, tmp_path: Path) -> None:
    """The harness's own model class around ours, on a task that it finds in a folder."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    questions = tmp_path / "questions.jsonl"
    with questions.open("w") as file:
        for number in range(8):
            choices = [f" {number + 1}", f" {number + 2} or so"]
            asked = {"question": f"{number} plus 1 is", "choices": choices, "answer": 0}
            file.write(json.dumps(asked) + "\n")
    (tmp_path / "sums.yaml").write_text(TASK.replace("FILE", str(questions)))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def use(model: Any) -> list[torch.Tensor]:
        results: Any = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=pair.tokenizer, batch_size=4),
            tasks=["sums"],
            task_manager=tasks,
            bootstrap_iters=0,
        )
        likelihoods = [
            [response[0] for response in sample["filtered_resps"]]
            for sample in results["samples"]["sums"]
        ]
        return [torch.tensor(results["results"]["sums"]["acc,none"]), torch.tensor(likelihoods)]

    _, likelihoods = same(pair, use)
    assert likelihoods.shape == (8, 2)
