"""Training while the swarm lives: servers that are killed, neighbours who train something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.hosting import HostedSwarm
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import swarm_notebook as sn
from swarm_notebook.client.passes import backward as backward_module
from swarm_notebook.client.passes import forward as forward_module
from swarm_notebook.widgets import TrainingMonitor

STEPS = 6


class Texts(torch.utils.data.Dataset):
    """Random token sequences of one length."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 128, (2 * STEPS, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def train(model: Any, folder: Path, *callbacks: Any, seed: int = 0) -> list[float]:
    """A run of the plain `Trainer` on a LoRA adapter; the losses of its steps."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = Trainer(adapted, arguments, train_dataset=Texts(seed), callbacks=list(callbacks))
    trainer.train()
    adapted.unload()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def local(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


@pytest.mark.parametrize("module", [forward_module, backward_module], ids=["forward", "backward"])
def test_a_killed_server_does_not_show_in_the_loss(
    tiny_swarm: Callable[..., sn.LocalSwarm],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
) -> None:
    servers = tiny_swarm([(0, 3), (0, 3), (3, 5)])
    killed: list[str] = []
    real, calls = module.call_with_adapter, 0

    async def call(directory: Any, segment: Any, *rest: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 6 and segment.start == 0 and not killed:
            killed.append(segment.peer)
            next(server for server in servers.servers if server.peer_id == segment.peer).kill()
        return await real(directory, segment, *rest, **named)

    monkeypatch.setattr(module, "call_with_adapter", call)
    with sn.connect(servers.initial_peers, model=tiny_llama) as swarm:
        monitor = TrainingMonitor(swarm)
        ours = train(swarm.model, tmp_path / "remote", monitor.callback())
    assert killed
    assert (monitor.failovers, monitor.state) == (1, "finished")
    assert monitor.retries >= 1
    assert monitor.told[0].startswith("step ")
    assert "server local-" in monitor.told[0]
    assert ours == pytest.approx(train(local(tiny_llama), tmp_path / "local"), rel=1e-4)


def adapted(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def losses_of(model: Any, seed: int) -> list[float]:
    """A hand-written loop without random numbers, so that two may run in threads at once."""
    texts, losses = Texts(seed), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for step in range(STEPS):
        ids = texts.ids[2 * step : 2 * step + 2]
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_neighbours_with_other_adapters_do_not_mix(
    tiny_llama: Path,
) -> None:
    """Two clients (two peers of the swarm) train at once; each equals its run alone."""
    seeds = (1, 2)
    alone = {seed: losses_of(adapted(local(tiny_llama), seed), seed) for seed in seeds}
    together: dict[int, list[float]] = {}
    with (
        HostedSwarm(tiny_llama, [(0, 2), (2, 5)]) as servers,
        sn.connect(servers.initial_peers[:1], model=tiny_llama) as first,
        sn.connect(servers.initial_peers[1:], model=tiny_llama) as second,
    ):
        models = [
            adapted(swarm.model, seed) for swarm, seed in zip((first, second), seeds, strict=True)
        ]

        def run(model: Any, seed: int) -> None:
            together[seed] = losses_of(model, seed)

        threads = [
            threading.Thread(target=run, args=pair) for pair in zip(models, seeds, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # The servers still hold both adapters; who uses none gets the plain model.
        ids = Texts(0).ids[:2]
        with torch.no_grad(), models[0].disable_adapter():
            plain = models[0](input_ids=ids).logits
    torch.testing.assert_close(plain, local(tiny_llama)(ids).logits, atol=1e-4, rtol=0)
    for seed in seeds:
        assert together[seed] == pytest.approx(alone[seed], rel=1e-4)
