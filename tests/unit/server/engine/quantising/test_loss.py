"""What few bits cost a model, against local models with the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_model
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from swarm_notebook import cli
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.packed import PackedWeight
from swarm_notebook.server.engine.quantising.calibration import calibration_tokens
from swarm_notebook.server.engine.quantising.loading import load_quantised
from swarm_notebook.server.engine.quantising.loss import measure_loss


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_perplexity_and_divergence_are_the_local_models(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tiny_model(family, tmp_path)
    found = measure_loss(resolve(folder), bits=6.5, dtype=torch.float32)
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2)
    ]
    loaded, told = load_quantised(resolve(folder), 0, 5, bits=6.5, dtype=torch.float32)
    layers = models[1].model.layers if family == "llama" else models[1].transformer.h
    for ours, layer in zip(loaded.layers, layers, strict=True):
        for name, parameter in ours.named_parameters():
            if isinstance(parameter, PackedWeight):
                dict(layer.named_parameters())[name].data.copy_(parameter.unpack())
    tokens = calibration_tokens(resolve(folder))
    with torch.inference_mode():
        logits = [model(tokens).logits.log_softmax(-1) for model in models]
    perplexity = [
        float(cross_entropy(one[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp())
        for one in logits
    ]
    divergence = kl_div(logits[1], logits[0], log_target=True, reduction="sum") / tokens.numel()
    assert found.bits == told.bits <= 6.5
    assert found.perplexity == pytest.approx(perplexity, rel=1e-3)
    assert found.divergence == pytest.approx(float(divergence), rel=1e-2)
    assert found.ratio == pytest.approx(perplexity[1] / perplexity[0], rel=1e-3)
    assert cli.main(["measure", str(folder), "--bits", "6.5"]) == 0
    assert capsys.readouterr().out.strip() == str(found)
