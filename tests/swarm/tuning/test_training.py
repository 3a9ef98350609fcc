"""Gradients and training through real servers, against the same model trained locally.

Everything at float32 over three servers (so two boundaries), with padding: gradients to 1e-4
relative, ten optimizer steps with the same losses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from support.pairs import Pair, local_model, pair_of
from support.tiny import tiny_model

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.tuning import DeepPrompts

FAMILIES = ["llama", "qwen3_moe", "gemma3_text", "bloom", "gpt2"]
TARGETS = {"bloom": ["query_key_value"], "gpt2": ["c_attn", "c_fc"]}


def lora(pair: Pair, **options: Any) -> peft.LoraConfig:
    targets = TARGETS.get(pair.kind, ["q_proj", "v_proj"])
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options
    )


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    blocks = resolve(folder).config().num_hidden_layers
    with pair_of(folder, [(0, 1), (1, 3), (3, blocks)], kind=request.param) as made:
        yield made


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids, mask = torch.randint(3, 128, (4, 10)), torch.ones(4, 10, dtype=torch.long)
    mask[1, :4] = mask[3, :7] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def same(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    assert ours is not None
    assert theirs is not None
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9


def same_weights(ours: Any, theirs: Any, what: str) -> None:
    """Gradients of all trainable parameters are equal, and there are some."""
    mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    local = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == local.keys(), what
    assert any(grad.norm() > 0 for grad in mine.values())
    for name, grad in mine.items():
        same(grad, local[name])


def pairs(pair: Pair, wrap: Any) -> tuple[Any, Any]:
    """The remote and the local model, wrapped with the same random initial weights."""
    models = []
    for model in (pair.remote, local_model(pair.folder)):
        torch.manual_seed(11)
        models.append(wrap(model))
    return models[0], models[1]


def test_gradients_of_inputs(pair: Pair, batch: dict[str, torch.Tensor]) -> None:
    grads = []
    for model in (pair.remote, local_model(pair.folder)):
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss.backward()
        grads.append(embeds.grad)
    same(*grads)


@pytest.mark.parametrize("kind", ["lora", "prompt", "dora", "ia3"])
@pytest.mark.works("Training: PEFT's adapters")
def test_adapters_train_as_they_do_locally(
    pair: Pair, batch: dict[str, torch.Tensor], kind: str
) -> None:
    if kind in ("dora", "ia3") and pair.kind != "llama":
        pytest.skip("every kind is trained on one family, the common ones on all")
    targets = lora(pair).target_modules
    configs: dict[str, Any] = {
        "lora": lora(pair, use_rslora=True),
        "dora": lora(pair, use_dora=True),
        "ia3": peft.IA3Config(
            target_modules=targets, feedforward_modules=[], task_type="CAUSAL_LM"
        ),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    }
    ours, theirs = pairs(
        pair, lambda model: peft.get_peft_model(model, copy.deepcopy(configs[kind]))
    )
    try:
        with torch.no_grad():
            ours(**batch)  # what starts from the base weights (DoRA) is filled in by the servers
        for model in (ours, theirs):
            torch.manual_seed(5)
            with torch.no_grad():
                for name, parameter in sorted(model.named_parameters()):
                    if "lora_B" in name:
                        parameter.normal_(std=0.1)
        losses = []
        for model in (ours, theirs):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=0.05)
            losses.append([])
            for _ in range(10):
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                losses[-1].append(loss.item())
                optimizer.step()
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert losses[0][-1] < losses[0][0]
        same_weights(ours, theirs, kind)
        with torch.no_grad():
            real = batch["attention_mask"].bool()
            # Virtual tokens of prompt tuning stand in front.
            logits = [model(**batch).logits[:, -10:][real] for model in (ours, theirs)]
            torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
        ids = batch["input_ids"][:1]
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()
    finally:
        if kind != "prompt":
            ours.unload()


def test_an_adapter_saved_untrained_holds_what_it_takes_from_the_base_weights(
    pair: Pair, tmp_path: Path
) -> None:
    ours, theirs = pairs(pair, lambda model: peft.get_peft_model(model, lora(pair, use_dora=True)))
    try:
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
    finally:
        ours.unload()
    saved = [load_file(tmp_path / name / SAFETENSORS_WEIGHTS_NAME) for name in ("ours", "theirs")]
    assert saved[0].keys() == saved[1].keys()
    magnitudes = [name for name in saved[0] if "magnitude" in name]
    assert magnitudes
    for name in magnitudes:
        same(saved[0][name], saved[1][name])


def test_an_adapter_moves_between_remote_and_local(
    pair: Pair, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    remote = peft.get_peft_model(pair.remote, lora(pair, init_lora_weights=False))
    try:
        with torch.no_grad():
            ours = remote(**batch).logits
        remote.save_pretrained(tmp_path)
    finally:
        remote.unload()
    local = peft.PeftModel.from_pretrained(local_model(pair.folder), tmp_path)
    again = peft.PeftModel.from_pretrained(pair.remote, tmp_path)
    try:
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            theirs = local(**batch).logits
            for logits in (ours, again(**batch).logits):
                torch.testing.assert_close(logits[real], theirs[real], atol=1e-4, rtol=0)
            with again.disable_adapter():
                plain = again(**batch).logits
            torch.testing.assert_close(
                plain[real], local_model(pair.folder)(**batch).logits[real], atol=1e-4, rtol=0
            )
    finally:
        again.unload()


@pytest.mark.works("Training: deep prompts")
def test_deep_prompts(pair: Pair, batch: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(2)
    deep = DeepPrompts(pair.remote, length=3, std=0.3)
    local = local_model(pair.folder)
    theirs = deep.prompts.detach().clone().requires_grad_()
    layers = next(m for m in local.modules() if isinstance(m, torch.nn.ModuleList))

    def adding(index: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = args[0] if args else kwargs["hidden_states"]
            padded = torch.zeros_like(hidden)
            padded[:, :3] = theirs[index]
            return (hidden + padded, *args[1:]), kwargs

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(adding(index), with_kwargs=True)
    try:
        loss, expected = pair.remote(**batch).loss, local(**batch).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
        expected.backward()
        same(deep.prompts.grad, theirs.grad)
    finally:
        deep.remove()


def test_dropout_of_an_adapter_is_repeated_in_backward(
    pair: Pair, batch: dict[str, torch.Tensor]
) -> None:
    """With dropout the loss is random, but forward and backward see the same draw."""
    torch.manual_seed(1)
    model = peft.get_peft_model(pair.remote, lora(pair, lora_dropout=0.5, init_lora_weights=False))
    try:
        model.train()
        losses, norms = [], []
        for _ in range(2):
            for seed in (1, 2):
                torch.manual_seed(seed)
                model.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                losses.append(loss.item())
                norms.append(
                    sum(p.grad.norm().item() for p in model.parameters() if p.requires_grad)
                )
        assert losses[:2] == losses[2:]
        assert norms[:2] == norms[2:]
        assert losses[0] != losses[1]
    finally:
        model.eval()
        model.unload()


def test_adapters_that_change_before_the_backward_pass_are_refused(
    pair: Pair, batch: dict[str, torch.Tensor]
) -> None:
    if pair.kind != "llama":
        pytest.skip("the same for all")
    ours, theirs = pairs(pair, lambda model: peft.get_peft_model(model, lora(pair)))
    try:
        for tuned in (ours, theirs):
            loss = tuned(**batch).loss
            weights = [one for one in tuned.parameters() if one.requires_grad]
            with torch.no_grad():
                for weight in weights:
                    weight.add_(1.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    finally:
        ours.unload()
