"""Hidden states on their way: as exact as the servers compute, or packed as the user wants it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosting import HostedSwarm
from support.scene import Scene, generate

import swarm_notebook as sn
from swarm_notebook.client.session import writer


@pytest.fixture
def packed(tiny_scene: Scene, tiny_llama: Path) -> Iterator[Any]:
    with sn.connect(tiny_scene.local.initial_peers, model=tiny_llama, compression="int8") as swarm:
        yield swarm


@torch.no_grad()
def test_int8_shifts_logits_a_little_and_is_shown(tiny_scene: Scene, packed: Any) -> None:
    """With a cache, over direct hops, and without one."""
    ids = tiny_scene.ids(2, 9)
    exact = tiny_scene.reference(ids).logits
    for use_cache in (True, False):
        shift = (packed.model(ids, use_cache=use_cache).logits - exact).abs()
        assert 1e-4 < float(shift.max()) < 0.22 * float(exact.std())
    assert "hidden states travel as int8" in repr(packed.status())
    assert "int8" not in repr(tiny_scene.swarm.status())


def moved(swarm: Any) -> int:
    """Bytes that went over the streams to all servers."""
    accounts = swarm.connection.directory.telemetry.usage.by_peer().values()
    return sum(account.meter.sent + account.meter.received for account in accounts)


def test_int8_takes_little_more_than_a_quarter_of_the_bytes(tiny_scene: Scene, packed: Any) -> None:
    ids = tiny_scene.ids(2, 100)
    sizes = []
    for swarm in (tiny_scene.swarm, packed):
        before = moved(swarm)
        generate(swarm.model, ids, max_new_tokens=1, min_new_tokens=1)
        sizes.append(moved(swarm) - before)
    # 48 values: 48 bytes and three scales, instead of 192 bytes; and what is around them.
    assert sizes[1] < 0.35 * sizes[0]


def test_gradients_are_not_packed(tiny_scene: Scene, packed: Any) -> None:
    ids = tiny_scene.ids(2, 9)
    gradients = []
    for model in (packed.model, tiny_scene.reference):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_an_unknown_compression(tiny_scene: Scene, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="compression: 'zip', expected 'float16' or 'int8'"):
        sn.connect(tiny_scene.local.initial_peers, model=tiny_llama, compression="zip")


@torch.no_grad()
def test_half_precision_travels_as_it_is_computed(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 model over a bfloat16 server: fewer bytes, and the very same result."""
    with (
        HostedSwarm(tiny_llama, 1, dtype="bfloat16") as local,
        sn.connect(local.initial_peers, model=tiny_llama, dtype="float32") as swarm,
    ):
        ids = torch.arange(3, 103)[None]
        found = []
        for rounded in (True, False):
            before = moved(swarm)
            if not rounded:
                monkeypatch.setattr(writer, "travelling", lambda hidden, _span: hidden)
            found.append((swarm.model(ids, use_cache=True).logits, moved(swarm) - before))
        (ours, few), (theirs, many) = found
        assert torch.equal(ours, theirs)
        assert abs(many - few - 100 * 48 * 2) < 100
