"""A classification head on remote blocks, against the same classifier trained locally."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.scene import Scene
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from swarm_notebook.errors import Unsupported

LABELS = ["dull", "bright", "odd"]


@pytest.fixture
def pair(tiny_scene: Scene, tiny_llama: Path) -> tuple[Any, Any]:
    """The remote classifier and a local one with the same new head."""
    return classifiers(tiny_scene, tiny_llama, LABELS)


def classifiers(scene: Scene, folder: Path, labels: list[str]) -> tuple[Any, Any]:
    ours: Any = scene.swarm.classifier(labels)
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(labels), dtype=torch.float32
    ).eval()
    theirs.requires_grad_(False)
    theirs.score.requires_grad_(True)
    theirs.score.load_state_dict(ours.score.state_dict())
    return ours, theirs


@pytest.fixture
def batch(tiny_scene: Scene) -> dict[str, torch.Tensor]:
    return {**tiny_scene.padded(), "labels": torch.tensor([0, 1, 2])}


def train(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def test_the_head_alone_is_trained(
    pair: tuple[Any, Any], batch: dict[str, torch.Tensor], tiny_scene: Scene
) -> None:
    ours, theirs = pair
    assert isinstance(ours, type(theirs))
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["score.weight"]
    assert ours.config.id2label == dict(enumerate(LABELS))
    assert ours.get_input_embeddings().weight is tiny_scene.remote.get_input_embeddings().weight
    losses = train(ours, batch)
    assert losses == pytest.approx(train(theirs, batch), rel=1e-4)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-4, rtol=0)


@pytest.mark.works("Training: a classifier's head and LoRA")
def test_head_and_lora_are_trained_and_move_to_the_local_model(
    pair: tuple[Any, Any], batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    plain = pair[1]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    tuned = []
    for model in (pair[0], copy.deepcopy(plain)):
        torch.manual_seed(3)
        tuned.append(peft.get_peft_model(model, copy.deepcopy(config)))
    losses = [train(model, batch) for model in tuned]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    tuned[0].save_pretrained(tmp_path)
    whole = peft.PeftModel.from_pretrained(plain, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            whole(**batch).logits, tuned[0](**batch).logits, atol=1e-4, rtol=0
        )


@pytest.mark.works("Training: one label (regression)")
def test_one_label_is_a_number(tiny_scene: Scene, tiny_llama: Path) -> None:
    ours, theirs = classifiers(tiny_scene, tiny_llama, ["length"])
    batch = {**tiny_scene.padded(), "labels": torch.tensor([0.3, -1.0, 2.0])}
    losses = train(ours, batch)
    assert losses == pytest.approx(train(theirs, batch), rel=1e-4)
    assert ours(**batch).logits.shape == (3, 1)


@pytest.mark.works("Training: reward models (losses of pairs, with adapters)")
def test_rewards_of_pairs(tiny_scene: Scene, tiny_llama: Path) -> None:
    """As TRL's reward trainer does it: both texts of a pair in one batch."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    batch, losses = tiny_scene.padded(), []
    batch = {name: torch.cat([one, one.flip(0)[:1]]) for name, one in batch.items()}
    for model in classifiers(tiny_scene, tiny_llama, ["reward"]):
        torch.manual_seed(3)
        tuned: Any = peft.get_peft_model(model, copy.deepcopy(config))
        optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(3):
            chosen, rejected = tuned(**batch).logits.squeeze(-1).chunk(2)
            loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.works("Training: a classifier's checkpoints in `Trainer`, and going on from one")
def test_checkpoints_of_a_trainer(tiny_scene: Scene, tiny_llama: Path, tmp_path: Path) -> None:
    """The whole way at once, and in two parts with what was learned forgotten between."""
    ours, theirs = classifiers(tiny_scene, tiny_llama, ["length"])
    new = copy.deepcopy(ours.score.state_dict())
    texts = torch.randint(3, 128, (4, 6), generator=torch.Generator().manual_seed(2)).tolist()
    data: Any = [{"input_ids": text, "labels": float(i % 3)} for i, text in enumerate(texts)]

    def learned(model: Any, part: str, steps: int, going_on: bool = False) -> torch.Tensor:
        model.score.load_state_dict(new)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / part),
            per_device_train_batch_size=2,
            max_steps=steps,
            lr_scheduler_type="constant",
            learning_rate=1e-2,
            save_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=going_on)
        return model.score.weight.detach().clone()

    whole, half = learned(ours, "whole", 4), learned(ours, "parts", 2)
    assert (whole - half).abs().max() > 1e-3
    for found in (whole, learned(ours, "parts", 4, going_on=True)):
        torch.testing.assert_close(found, learned(theirs, "local", 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("labels", [[], ["same", "same"]])
def test_labels_that_make_no_classifier(tiny_scene: Scene, labels: list[str]) -> None:
    with pytest.raises(ValueError, match=r"labels: .* different names"):
        tiny_scene.swarm.classifier(labels)


def test_a_classifier_generates_nothing(pair: tuple[Any, Any]) -> None:
    assert not hasattr(pair[0], "generate")


def test_hooks_work_on_it(pair: tuple[Any, Any], batch: dict[str, torch.Tensor]) -> None:
    seen: list[torch.Tensor] = []
    for model in pair:
        handle = model.model.layers[2].register_forward_hook(
            lambda _module, _args, states: seen.append(states)
        )
        with torch.no_grad():
            model(**batch)
        handle.remove()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(seen[0][real], seen[1][real], atol=1e-4, rtol=0)


def test_a_family_without_classifiers(tiny_scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", {})
    with pytest.raises(Unsupported, match="no sequence classifier for 'llama'"):
        tiny_scene.swarm.classifier(LABELS)
