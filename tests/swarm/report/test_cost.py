"""What a run takes: real ones, against their preview."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from support.scene import Scene

TOKENS, NEW = 10, 14


def test_a_real_run_costs_what_the_preview_says(tiny_scene: Scene) -> None:
    from support.scene import generate

    swarm = tiny_scene.swarm
    expected = swarm.preview(prompt_tokens=TOKENS, max_new_tokens=NEW, batch=2)
    before = swarm.bill()
    generate(swarm.model, tiny_scene.ids(2, TOKENS))
    taken = swarm.bill() - before
    assert taken.requests == expected.requests == 2 * NEW
    assert taken.sent == pytest.approx(expected.sent, rel=0.05)
    assert taken.received == pytest.approx(expected.received, rel=0.05)
    assert {server.name for server in taken.servers} == set(expected.servers)
    assert [server.tokens for server in taken.servers] == [2 * (TOKENS + NEW - 1)] * 2
    assert all(server.seconds > 0 for server in taken.servers)


def test_a_preview_says_what_blocks_at_home_take(tiny_scene: Scene) -> None:
    swarm = tiny_scene.swarm
    asked = {"prompt_tokens": TOKENS, "max_new_tokens": NEW}
    weights = tiny_scene.reference.model.layers[3].parameters()
    for _ in range(20):
        before = swarm.preview(**asked, own=3)
        assert not swarm.owned
        swarm.own(3)
        try:
            there = swarm.preview(**asked)
        finally:
            swarm.release()
        # Its seconds are of how fast servers say they are, which may change at any time.
        if swarm.preview(**asked, own=3) == before:
            break
    assert there == before
    assert before.home == (3,)
    assert before.home_bytes == sum(weight.nbytes for weight in weights)
    assert before.requests == 3 * NEW  # one more stretch
    assert "at home block 3, " in str(before)
    assert swarm.preview(**asked).home_bytes == 0


def test_training_is_on_the_bill_as_well(tiny_scene: Scene) -> None:
    swarm, ids = tiny_scene.swarm, tiny_scene.ids(1, 8)
    before = swarm.bill()
    embedded = swarm.model.get_input_embeddings()(ids).detach().requires_grad_()
    swarm.model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    taken = swarm.bill() - before
    assert taken.requests == 4  # two servers, forward and back
    assert taken.sent > 3 * 2 * 8 * 48 * torch.float32.itemsize  # input, input and gradient


def test_status_knows_the_age_of_its_facts_and_who_is_needed(tiny_scene: Scene) -> None:
    status = tiny_scene.swarm.status()
    assert status.read is not None
    online = [row for row in status.servers if row.state == "online"]
    assert len(online) == 2
    for row in online:
        assert row.announced is not None
        assert row.heard is not None
        assert row.announced <= status.read <= row.heard + 60
        assert status.needed(row.peer_id) == list(range(row.start, row.end))
    again = tiny_scene.swarm.status(refresh=False)
    assert again.read == status.read
    assert status.needed("nobody") == []
