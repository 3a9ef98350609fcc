"""TRL's trainers on a remote model, as TRL's documentation uses them: losses equal to local's.

    python -m pytest --noconftest -p no:cacheprovider tests/foreign/trl_on_remote.py

Its own tests are not in what it publishes. `make foreign` installs it beside the project.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import trl
from support.letter_tokenizer import LetteredPair, lettered_pair
from transformers import AutoModelForSequenceClassification

WORDS = ["the sky is blue", "grass is green", "two and two is four", "cats sleep all day"]
COMMON: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.02,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LetteredPair]:
    with lettered_pair(tmp_path_factory.mktemp("trl")) as pair:
        pair.tokenizer.pad_token = pair.tokenizer.pad_token or pair.tokenizer.eos_token
        yield pair


def lora(task: str = "CAUSAL_LM") -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type=task)


def trained(
    kind: Any, config: Any, model: Any, rows: Any, pair: LetteredPair, **more: Any
) -> list[Any]:
    """Losses, gradient norms and rewards of a run; the model is as before afterwards."""
    torch.manual_seed(0)
    trainer = kind(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=pair.tokenizer,
        peft_config=lora("SEQ_CLS" if kind is trl.RewardTrainer else "CAUSAL_LM"),
        **more,
    )
    trainer.train()
    told = ("loss", "grad_norm", "reward", "rewards/margins", "kl", "entropy")
    found = [entry[name] for entry in trainer.state.log_history for name in told if name in entry]
    trainer.accelerator.unwrap_model(trainer.model).unload()
    return found


def test_sft(pair: LetteredPair, tmp_path: Path) -> None:
    rows = [{"text": text} for text in WORDS * 2]
    config = trl.SFTConfig(output_dir=str(tmp_path), dataset_text_field="text", **COMMON)
    ours, theirs = [
        trained(trl.SFTTrainer, config, model, rows, pair)
        for model in (pair.swarm.model, pair.local)
    ]
    assert len(ours) >= 6
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_dpo(pair: LetteredPair, tmp_path: Path) -> None:
    rows = [{"prompt": text[:5], "chosen": text[5:], "rejected": text[:4:-1]} for text in WORDS * 2]
    config = trl.DPOConfig(output_dir=str(tmp_path), **COMMON)
    ours, theirs = [
        trained(trl.DPOTrainer, config, model, rows, pair)
        for model in (pair.swarm.model, pair.local)
    ]
    assert len(ours) >= 6
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_grpo(pair: LetteredPair, tmp_path: Path) -> None:
    rows = [{"prompt": text[:6]} for text in WORDS * 2]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(text.count("a") + len(set(text))) for text in completions]

    config = trl.GRPOConfig(
        output_dir=str(tmp_path), num_generations=2, max_completion_length=6, beta=0.1, **COMMON
    )
    ours, theirs = [
        trained(trl.GRPOTrainer, config, model, rows, pair, reward_funcs=reward)
        for model in (pair.swarm.model, pair.local)
    ]
    assert len(ours) >= 6
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_reward(pair: LetteredPair, tmp_path: Path) -> None:
    rows = [{"chosen": text, "rejected": text[::-1]} for text in WORDS * 2]
    config = trl.RewardConfig(output_dir=str(tmp_path), **COMMON)
    remote = pair.swarm.classifier(["reward"])
    local: Any = AutoModelForSequenceClassification.from_pretrained(
        pair.folder, num_labels=1, dtype=torch.float32
    )
    local.requires_grad_(False)
    with torch.no_grad():
        local.score.weight.copy_(remote.score.weight)
    ours, theirs = [
        trained(trl.RewardTrainer, config, model, rows, pair) for model in (remote, local)
    ]
    assert len(ours) >= 6
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
