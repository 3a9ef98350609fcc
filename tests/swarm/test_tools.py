"""Tools of the ecosystem on a remote model, unmodified, used as their own documentation shows.

Each is run on the remote model and on the same model held locally: what they say must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnsight
import peft
import pytest
import torch
import transformers
from support.hosting import HostedSwarm
from support.letter_tokenizer import add_tokenizer
from support.tiny import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import swarm_notebook as sn
from swarm_notebook.errors import Unsupported

BLOCKS = 5
TARGET = 40


@dataclass
class Pair:
    remote: Any
    folder: Path
    tokenizer: Any

    def local(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        return model.requires_grad_(False)

    def same(self, use: Callable[[Any], list[torch.Tensor]]) -> list[torch.Tensor]:
        """What a tool says of both models is equal; returns it."""
        ours, theirs = use(self.remote), use(self.local())
        assert len(ours) == len(theirs) > 0
        for mine, local in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, local, atol=1e-4, rtol=1e-4, equal_nan=True)
        return ours

    @property
    def ids(self) -> torch.Tensor:
        return self.tokenizer("hello there", return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = add_tokenizer(tiny_model("llama", tmp_path_factory.mktemp("tools")))
    with (
        HostedSwarm(folder, [(0, 2), (2, BLOCKS)]) as servers,
        sn.connect(servers.initial_peers, model=folder) as swarm,
    ):
        yield Pair(swarm.model, folder, AutoTokenizer.from_pretrained(folder))


CONFIGS: dict[str, peft.PeftConfig] = {
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "mlp.up_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.works("Tools: transformers' Trainer")
def test_trainer(pair: Pair, kind: str, tmp_path: Path) -> None:
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
        train(pair.local(), tmp_path / "local"),
    )
    assert len(ours) == 8
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert our_end == pytest.approx(their_end, rel=1e-4)
    assert ours[-2] < ours[0]
    checkpoint = tmp_path / "remote" / "checkpoint-4"
    loaded: Any = peft.PeftModel.from_pretrained(pair.local(), checkpoint)
    saved: Any = peft.PeftModel.from_pretrained(pair.local(), tmp_path / "local" / "checkpoint-4")
    with torch.no_grad():
        logits = [model(pair.ids).logits for model in (loaded, saved)]
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)


@pytest.mark.works("Tools: transformers' pipelines")
def test_pipeline(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
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

    pair.same(use)
    assert "not supported" not in caplog.text


@pytest.mark.works("Tools: nnsight, on blocks")
def test_nnsight_reads_and_writes(pair: Pair) -> None:
    def use(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        with traced.trace(pair.ids):
            before = traced.model.layers[1].output.clone().save()
            traced.model.layers[2].output[:, 1] = 0
            entering = traced.model.layers[3].input.save()
            traced.model.layers[4].output = traced.model.layers[4].output * 2
            logits = traced.output.logits.save()
        return [before, entering, logits]

    before, entering, _ = pair.same(use)
    assert not entering[:, 1].any()
    assert before[:, 1].any()


@pytest.mark.works("Tools: nnsight, outputs of modules inside remote blocks")
def test_nnsight_reads_inside_of_blocks(pair: Pair) -> None:
    def once(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        with traced.trace(pair.ids):
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
        with traced.trace(pair.ids, fn=model.generate, **options) as run:
            states = nnsight.save([])
            for _ in run.iter[1:3]:
                states.append(traced.model.layers[2].mlp.output.clone())
        return states

    def blocks(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        with traced.trace(pair.ids) as run:
            kept = run.cache(modules=[traced.model.layers[1], traced.model.layers[3]]).save()
        return [kept[f"model.model.layers.{block}"].output for block in (1, 3)]

    for use in (once, steps, blocks):
        pair.same(use)


@pytest.mark.refused(
    "Tools: nnsight, all else inside remote blocks (inputs, writes, `tracer.cache` of everything)",
    "name blocks, or `swarm.own(block)`",
)
def test_nnsight_is_refused_what_is_not_there(pair: Pair) -> None:
    traced: Any = nnsight.NNsight(pair.remote)

    def read_an_input() -> None:
        with traced.trace(pair.ids):
            traced.model.layers[1].mlp.input.save()

    def write() -> None:
        with traced.trace(pair.ids):
            traced.model.layers[1].mlp.output = traced.model.layers[1].mlp.output * 2

    def keep_everything() -> None:
        with traced.trace(pair.ids) as run:
            run.cache()

    for use, words in (
        (read_an_input, r"asks for .*1\.mlp\.input.* swarm\.own"),
        (write, r"writes to .*1\.mlp\.output.* swarm\.own"),
        (keep_everything, r"tracer\.cache asks for .* swarm\.own"),
    ):
        with pytest.raises(Unsupported, match=words):
            use()
    pair.same(lambda model: [model(pair.ids).logits.detach()])


def test_shapes_without_values(pair: Pair) -> None:
    """As nnsight's `scan` of a whole model asks for them: the servers are asked nothing."""
    found = []
    for model in (pair.remote, pair.local()):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            ids, mask = fake.from_tensor(pair.ids), fake.from_tensor(torch.ones_like(pair.ids))
            out = model(ids, attention_mask=mask, output_hidden_states=True)
        found.append((out.logits.shape, [state.shape for state in out.hidden_states]))
    assert found[0] == found[1]


def test_nnsight_skips_a_block(pair: Pair) -> None:
    def use(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        with traced.trace(pair.ids, use_cache=False):
            traced.model.layers[1].skip(traced.model.layers[1].input)
            logits = traced.lm_head.output.save()
        return [logits]

    pair.same(use)


@pytest.mark.works("Tools: nnsight, gradients")
def test_nnsight_gradients(pair: Pair) -> None:
    def use(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        with traced.trace(pair.ids):
            embedded = traced.model.embed_tokens.output
            embedded.requires_grad_(True)
            middle = traced.model.layers[2].output
            logits = traced.output.logits
            with logits[:, -1, TARGET].sum().backward():
                at_middle = middle.grad.save()
                middle.grad = middle.grad * 2
                at_embeddings = embedded.grad.save()
        return [at_middle, at_embeddings]

    pair.same(use)


def test_nnsight_over_generation_steps(pair: Pair) -> None:
    def use(model: Any) -> list[torch.Tensor]:
        traced = nnsight.NNsight(model)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        with traced.trace(pair.ids, fn=model.generate, **options) as tracer:
            states = nnsight.save([])
            for step in tracer.iter[:4]:
                states.append(traced.model.layers[1].output.clone())
                if step > 1:
                    traced.model.layers[3].output[:] = traced.model.layers[3].output * -1.5
            tokens = tracer.result.save()
        return [tokens, *states]

    tokens, *states = pair.same(use)
    assert [state.shape[1] for state in states] == [pair.ids.shape[1], 1, 1, 1]
    plain = pair.remote.generate(pair.ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.tolist() != plain.tolist()


def test_captum_on_embeddings(pair: Pair) -> None:
    from captum.attr import IntegratedGradients, LayerIntegratedGradients

    def use(model: Any) -> list[torch.Tensor]:
        embed = model.get_input_embeddings()
        embedded = embed(pair.ids)
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
            pair.ids, baselines=torch.zeros_like(pair.ids), target=TARGET, n_steps=10
        )
        return [found, delta, of_tokens]

    found, *_ = pair.same(use)
    assert found.abs().max() > 1e-3


@pytest.mark.works("Tools: captum, on embeddings and blocks")
def test_captum_on_blocks(pair: Pair) -> None:
    from captum.attr import LayerActivation, LayerGradientXActivation, LayerIntegratedGradients

    def use(model: Any) -> list[torch.Tensor]:
        # captum wants the gradient at a block: something before it must ask for one.
        model.get_input_embeddings().requires_grad_(True)
        try:

            def last(ids: torch.Tensor) -> torch.Tensor:
                return model(ids).logits[:, -1]

            block = model.model.layers[2]
            integrated = LayerIntegratedGradients(last, model.model.layers[1]).attribute(
                pair.ids, baselines=torch.zeros_like(pair.ids), target=TARGET, n_steps=10
            )
            return [
                LayerActivation(last, block).attribute(pair.ids),
                LayerGradientXActivation(last, block).attribute(pair.ids, target=TARGET),
                integrated,
            ]
        finally:
            model.get_input_embeddings().requires_grad_(False)

    for found in pair.same(use):
        assert found.abs().max() > 1e-3


@pytest.mark.works("Tools: captum for language models")
def test_captum_for_language_models(pair: Pair) -> None:
    from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

    def use(model: Any) -> list[torch.Tensor]:
        attribution = LLMAttribution(FeatureAblation(model), pair.tokenizer)
        # Its way through the cache is written for transformers 4: on 5 it feeds all tokens again.
        found = attribution.attribute(
            TextTokenInput("abc de", pair.tokenizer), target="fg", use_cached_outputs=False
        )
        return [found.seq_attr, found.token_attr]

    pair.same(use)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize("method", ["saliency", "layer_gradient_x_activation"])
@pytest.mark.works("Tools: inseq")
def test_inseq(pair: Pair, method: str) -> None:
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

    (found,) = pair.same(use)
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
def test_lm_eval(pair: Pair, tmp_path: Path) -> None:
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

    _, likelihoods = pair.same(use)
    assert likelihoods.shape == (8, 2)
