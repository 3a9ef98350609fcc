"""Servers that poison gradients are found, named and left; honest ones are not blamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import liars
from support.hosting import HostedServer, HostedSwarm
from support.patience import PATIENCE

import swarm_notebook as sn
from swarm_notebook.swarm import Swarm
from swarm_notebook.tuning import DeepPrompts, Rollback

# Of two rows: more than the tokens after which a new server is audited in any case.
LENGTH = 72


@pytest.fixture(scope="module")
def trio(tiny_llama: Path) -> Iterator[HostedSwarm]:
    """Three servers of all blocks."""
    with HostedSwarm(tiny_llama, [(0, 5)] * 3) as swarm, swarm.with_a_node():
        yield swarm


@pytest.fixture
def swarm(trio: HostedSwarm) -> Iterator[Swarm]:
    with sn.connect(trio.initial_peers, model=trio.model, verify=1.0) as swarm:
        yield swarm


def first_server(local: HostedSwarm, swarm: Swarm) -> HostedServer:
    first = swarm.route().hops[0].peer_id
    return next(server for server in local.servers if server.peer_id == first)


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
    liar = first_server(trio, swarm)
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


def test_gradients_of_halves_are_not_audited(tiny_llama: Path) -> None:
    """Honest ones differ by more than the limits allow."""
    with (
        HostedSwarm(tiny_llama, [(0, 5)] * 2, dtype="bfloat16") as local,
        sn.connect(local.initial_peers, model=local.model, verify=1.0) as swarm,
    ):
        train_once(swarm, adapter=False)
        verdicts = swarm.audit(wait=PATIENCE).verdicts
        assert {one.back for one in verdicts} == {False}


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
