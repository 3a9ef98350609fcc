"""Servers that die while a block with changed weights is at home."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scene import AtToken, Scene, generate, scene

from swarm_notebook.tuning import DeepPrompts


@pytest.fixture(scope="module")
def made(tiny_llama: Path) -> Iterator[Scene]:
    with scene(tiny_llama, [(0, 3), (0, 3), (3, 5), (3, 5)]) as found:
        with torch.no_grad():
            found.swarm.own(2)
            for model in (found.remote, found.reference):
                model.model.layers[2].mlp.down_proj.weight.mul_(1.3)
        yield found


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("which", ["first", "last"])
def test_a_server_dies(made: Scene, which: str, options: dict[str, Any]) -> None:
    """The rest of the text is the same; block 2 and the servers that live replay nothing."""
    made.begin()

    def kill() -> None:
        hops = made.sessions[-1].hops
        made.server(hops[0 if which == "first" else -1].segment.peer).kill()

    passes: list[int] = []
    count = made.remote.model.layers[2].register_forward_hook(
        lambda _m, _i, output: passes.append(output.shape[1])
    )
    handle = AtToken({5: kill})
    ours = generate(made.remote, made.padded(), stopping_criteria=[handle], **options)
    count.remove()
    made.same(ours, generate(made.reference, made.padded(), **options))
    session = made.sessions[-1]
    assert session.failovers == 1
    assert [(hop.start, hop.end) for hop in session.hops] == [(0, 2), (3, 5)]
    assert passes == [12] + [1] * (ours.sequences.shape[1] - 13)


def test_deep_prompts_are_replayed(made: Scene) -> None:
    made.begin()
    prompts = DeepPrompts(made.remote, 4, std=0.5)
    try:
        whole = generate(made.remote, made.padded())
        handle = AtToken({5: lambda: made.in_use().kill()})
        ours = generate(made.remote, made.padded(), stopping_criteria=[handle])
        made.same(ours, whole)
        assert made.sessions[-1].failovers == 1
    finally:
        prompts.remove()
