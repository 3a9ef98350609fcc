"""Servers that poison gradients are found, named and left; honest ones are not blamed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import liars
from support.hosting import HostedSwarm
from support.patience import PATIENCE
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import swarm_notebook as sn
from swarm_notebook.swarm import Swarm
from swarm_notebook.tuning import DeepPrompts, Rollback

# Of two rows: more than the tokens after which a new server is audited in any case.
LENGTH = 72


@pytest.fixture
def swarm(trio: HostedSwarm) -> Iterator[Swarm]:
    with sn.connect(trio.initial_peers, model=trio.model, verify=1.0) as swarm:
        yield swarm


def train_once(swarm: Swarm, *, adapter: bool = False) -> None:
    """A forward and a backward pass over two rows, the second one padded."""
    ids = torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model = swarm.model
    if adapter:
        config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)  # type: ignore[arg-type, assignment]
    embeddings = swarm.model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, attention_mask=mask).logits[mask.bool()].sum().backward()
    assert embeddings.grad is not None


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("lie", liars.GRADIENT_LIES)
def test_a_poisoned_gradient_is_found_by_its_first_audit(
    trio: HostedSwarm, swarm: Swarm, lie: str, adapter: bool
) -> None:
    liar = trio.next_of(swarm)
    with liars.lying(liar, liars.GRADIENT_LIES[lie]):
        train_once(swarm, adapter=adapter)
        table = swarm.audit(wait=PATIENCE)
    assert [(one.back, one.outcome) for one in table.verdicts] == [
        (False, "agreed"),
        (True, "wrong"),
    ]
    assert table.wrong == (liar.peer_id,)
    assert "gradients of" in table.verdicts[1].why
    assert swarm.route().hops[0].peer_id != liar.peer_id


@pytest.mark.parametrize("kind", ["plain", "adapter", "deep prompts"])
def test_honest_gradients_agree(swarm: Swarm, kind: str) -> None:
    if kind == "deep prompts":
        DeepPrompts(swarm.model, 3)
    train_once(swarm, adapter=kind == "adapter")
    verdicts = swarm.audit(wait=PATIENCE).verdicts
    assert [(one.back, one.outcome) for one in verdicts] == [(False, "agreed"), (True, "agreed")]


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def halves(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[HostedSwarm]:
    """Three servers of all blocks that compute in halves."""
    with (
        HostedSwarm(tiny_llama, [(0, 5)] * 3, dtype=request.param) as swarm,
        swarm.with_a_node(),
    ):
        yield swarm


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("lie", [None, *liars.GRADIENT_LIES])
def test_gradients_in_halves_are_audited(
    halves: HostedSwarm, lie: str | None, adapter: bool
) -> None:
    with sn.connect(halves.initial_peers, model=halves.model, verify=1.0) as swarm:
        server = halves.next_of(swarm)
        with liars.lying(server, liars.GRADIENT_LIES[lie] if lie else lambda _layers: []):
            train_once(swarm, adapter=adapter)
            table = swarm.audit(wait=PATIENCE)
    expected = "wrong" if lie else "agreed"
    assert [(one.back, one.outcome) for one in table.verdicts] == [
        (False, "agreed"),
        (True, expected),
    ]
    assert table.wrong == ((server.peer_id,) if lie else ())


def test_training_goes_back_to_what_is_known_to_be_good(tiny_llama: Path) -> None:
    ids = torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    kept = []
    # One server, which the notebook audits itself: a second one might be asked in its place.
    with (
        HostedSwarm(tiny_llama, [(0, 5)]) as local,
        sn.connect(local.initial_peers, model=local.model, verify=1.0, verify_here=True) as swarm,
    ):
        prompts = DeepPrompts(swarm.model, 3)
        optimizer = torch.optim.Adam(prompts.parameters(), lr=0.01)
        rollback = Rollback(swarm, every=1)
        rollback.begin(prompts, optimizer)

        def step(number: int) -> int | None:
            optimizer.zero_grad()
            swarm.model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            kept.append(prompts.prompts.detach().clone())
            swarm.audit(wait=PATIENCE)
            return rollback.step(number, prompts, optimizer)

        assert [step(1), step(2), step(3)] == [None] * 3
        with liars.lying(local.servers[0], liars.GRADIENT_LIES["flipped"]):
            assert step(4) == 2
        assert rollback.rolled_back == [(4, 2)]
        assert torch.equal(prompts.prompts, kept[1])
        assert optimizer.state_dict()["state"][0]["step"] == 2


class _Liar(TrainerCallback):
    """Flips gradients of the server in use from a step on; each step waits for its audits.

    Hooks are in all of them from the start: blocks with an adapter are copies of those then.
    """

    def __init__(self, local: HostedSwarm, swarm: Swarm, step: int):
        self._swarm, self._step = swarm, step
        self._factors = {server.peer_id: 1.0 for server in local.servers}
        self.lying = contextlib.ExitStack()
        for server in local.servers:
            lie = liars.outputs(partial(self._changed, server.peer_id))
            self.lying.enter_context(liars.lying(server, lie))

    def _changed(self, peer: str, states: torch.Tensor) -> torch.Tensor:
        return liars.with_gradient(states, self._factors[peer])

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            self._factors[self._swarm.audit().verdicts[-1].peer] = -1.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._swarm.audit(wait=PATIENCE)


def lora_of(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with LoRA in it, the same each time, and what will be trained."""
    torch.manual_seed(0)
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    return adapted, {name: one for name, one in adapted.named_parameters() if one.requires_grad}


def trained(model: Any, folder: Path, steps: int, *callbacks: TrainerCallback) -> None:
    """By transformers' `Trainer`, always on the same batch."""
    ids = torch.randint(3, 128, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=steps,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    data: Any = [{"input_ids": ids, "labels": ids}] * (2 * steps)
    Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks)).train()


def test_a_trainer_goes_back_and_on_elsewhere(
    trio: HostedSwarm, swarm: Swarm, tiny_llama: Path, tmp_path: Path
) -> None:
    model, ours = lora_of(swarm.model)
    liar = _Liar(trio, swarm, step=3)
    rollback = Rollback(swarm, every=1)
    with liar.lying:
        trained(model, tmp_path, 6, liar, rollback)
    # Found in the step that it has spoilt; the one before was audited after its snapshot's time.
    assert rollback.rolled_back == [(4, 2)]
    assert swarm.audit().wrong
    local, theirs = lora_of(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    trained(local, tmp_path, 6 - 2)
    for found, expected in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_notebook_decides_on_gradients_where_there_is_no_third(tiny_llama: Path) -> None:
    with (
        HostedSwarm(tiny_llama, [(0, 5)]) as local,
        sn.connect(local.initial_peers, model=local.model, verify=1.0, verify_here=True) as swarm,
    ):
        train_once(swarm)
        DeepPrompts(swarm.model, 3)
        train_once(swarm)
        assert {one.outcome for one in swarm.audit(wait=PATIENCE).verdicts} == {"agreed"}
        with liars.lying(local.servers[0], liars.GRADIENT_LIES["1.1 times"]):
            train_once(swarm)
            table = swarm.audit(wait=PATIENCE)
    assert table.verdicts[-1].by == ("this notebook",)
    assert table.wrong == (local.servers[0].peer_id,)
