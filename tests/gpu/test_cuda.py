"""Servers on a GPU against the local model on the same one; only where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

import swarm_notebook as sn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FAMILIES = ["llama", "qwen3_moe", "gemma3_text", "gpt_oss", "bloom"]
TOKENS = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False}


@dataclass
class Pair:
    family: str
    local: Any
    remote: Any


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder: Path = tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().cuda()
    spans = [(0, 2), (2, local.config.num_hidden_layers)]
    with (
        sn.LocalSwarm(folder, spans, device="cuda") as servers,
        sn.connect(servers.initial_peers, model=folder) as swarm,
    ):
        yield Pair(request.param, local.requires_grad_(False), swarm.model)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_padded_batch(pair: Pair, where: str) -> None:
    ids, mask = torch.randint(3, 128, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = mask[2, :9] = 0
    outcomes = []
    for model, device in ((pair.remote.to(where), where), (pair.local, "cuda")):
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        with torch.no_grad():
            logits = model(**batch).logits.cpu()[mask.bool()]
        outcomes.append((logits, model.generate(**batch, **TOKENS).tolist()))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], atol=1e-4, rtol=0)
    assert outcomes[0][1] == outcomes[1][1]


def test_what_runs_here_is_on_the_card_from_the_beginning(tiny_llama: Path) -> None:
    ids = torch.randint(3, 128, (1, 9))
    local = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with sn.LocalSwarm(tiny_llama, 1) as servers:
        for device, where in (("auto", "cuda"), ("cpu", "cpu"), ("cuda:0", "cuda")):
            with sn.connect(servers, device=device) as swarm:
                assert swarm.model.device.type == where
                got = swarm.model.generate(ids.to(swarm.model.device), **TOKENS)
                assert got.tolist() == local.generate(ids, **TOKENS).tolist()


def test_sessions_that_run_together(pair: Pair) -> None:
    prompts = [torch.randint(3, 128, (1, length)) for length in (4, 9, 14, 20)]
    expected = [pair.local.generate(ids.cuda(), **TOKENS).tolist() for ids in prompts]
    remote = pair.remote.to("cpu")
    with ThreadPoolExecutor() as threads:
        got = list(threads.map(lambda ids: remote.generate(ids, **TOKENS).tolist(), prompts))
    assert got == expected


def test_gradients_of_an_adapter(pair: Pair) -> None:
    if pair.family == "bloom":
        pytest.skip("its projections have other names; the way is the same")
    ids = torch.randint(3, 128, (4, 10)).cuda()
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    found = []
    for model in (pair.remote.to("cuda"), pair.local):
        torch.manual_seed(1)
        tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config)).cuda()
        tuned(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
        tuned.unload()
    for name, theirs in found[1].items():
        assert (found[0][name] - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9
