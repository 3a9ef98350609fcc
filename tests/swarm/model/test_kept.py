"""Positions of a prompt that do not travel back: only where nobody could see them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scene import TOLERANCE, Scene, generate, scene
from torch import nn

from swarm_notebook.client.session.hop import Hop
from swarm_notebook.errors import Unsupported

LENGTH = 9


@pytest.fixture(scope="module")
def stage(tiny_llama: Path) -> Iterator[Scene]:
    with scene(tiny_llama, [(0, 5)], hosted=True) as made:
        yield made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Of how many positions each step wants the output."""
    found: list[int | None] = []
    send = Hop.send

    async def counted(self: Hop, request: Any, route: Any) -> float:
        found.append(request.last)
        return await send(self, request, route)

    monkeypatch.setattr(Hop, "send", counted)
    return found


def logits(model: Any, ids: torch.Tensor, kept: int) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=True, logits_to_keep=kept).logits
    return found


def test_as_many_as_logits_are_wanted(stage: Scene, asked: list[int | None]) -> None:
    ids = stage.ids(2, LENGTH)
    for kept in (1, 3, LENGTH, 0):
        expected = logits(stage.reference, ids, kept)
        torch.testing.assert_close(logits(stage.remote, ids, kept), expected, atol=1e-4, rtol=0)
    assert asked == [1, 3, None, None]


OBSERVERS: dict[str, Callable[[Any], Any]] = {
    "the last block": lambda model: model.model.layers[-1],
    "the norm": lambda model: model.model.norm,
    "the decoder": lambda model: model.model,
    "the head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_who_looks_sees_all(stage: Scene, asked: list[int | None], name: str) -> None:
    seen: list[torch.Tensor] = []

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    ids = stage.ids(1, LENGTH)
    for model in (stage.remote, stage.reference):
        hook = OBSERVERS[name](model).register_forward_hook(look)
        logits(model, ids, 1)
        hook.remove()
    torch.testing.assert_close(*seen, atol=TOLERANCE, rtol=0)
    assert asked == [None]


def test_other_blocks_may_be_changed_and_read(stage: Scene, asked: list[int | None]) -> None:
    def add(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.3 * torch.sin(output)

    ids = stage.ids(2, LENGTH)
    hooks = [
        model.model.layers[2].register_forward_hook(add)
        for model in (stage.remote, stage.reference)
    ]
    stage.same(generate(stage.remote, ids), generate(stage.reference, ids))
    for hook in hooks:
        hook.remove()
    assert asked[:2] == [1, 1]  # from block 0 on, and from the changed one on


def test_a_module_that_mixes_positions_is_refused_once(
    stage: Scene, asked: list[int | None]
) -> None:
    class Mean(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden - hidden.mean(dim=1, keepdim=True)

    # Copies, as the remote model remembers that it is not to be trusted.
    remote, local = models = copy.deepcopy(stage.remote), copy.deepcopy(stage.reference)
    ids = stage.ids(1, LENGTH)
    for model in models:
        model.model.norm = Mean()
    with pytest.raises(Unsupported, match="NaN in the logits"):
        logits(remote, ids, 1)
    expected = logits(local, ids, 1)
    torch.testing.assert_close(logits(remote, ids, 1), expected, atol=1e-4, rtol=0)
    assert asked == [1, None]
