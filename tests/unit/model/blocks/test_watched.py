"""Whether anything about modules has changed is seen, whatever it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from swarm_notebook.model.blocks.hooks import ChangeWatch


def blocks() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU())) for _ in range(2)]


def nothing(*_: Any) -> None:
    pass


def exchange(block: Any) -> None:
    block[1][0] = nn.ReLU()


def plant(block: Any) -> None:
    block[0].forward = nothing


def replace_hooks(block: Any) -> None:
    block[0]._forward_hooks = OrderedDict({7: nothing})


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda block: block[1][0].register_forward_hook(nothing),
    "a hook before": lambda block: block[0].register_forward_pre_hook(nothing),
    "a hook backward": lambda block: block.register_full_backward_hook(nothing),
    "hooks put in their place": replace_hooks,
    "a module exchanged": exchange,
    "a module added": lambda block: block[1].append(nn.ReLU()),
    "a module removed": lambda block: block[1].pop(0),
    "a forward planted": plant,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[Any], Any]) -> None:
    watched = blocks()
    watch = ChangeWatch(watched)
    assert watch.unchanged
    change(watched[1])
    assert not watch.unchanged


def test_a_hook_that_goes_and_one_that_comes_beside_another_are_seen() -> None:
    watched = blocks()
    handle = watched[0].register_forward_hook(nothing)
    watch = ChangeWatch(watched)
    second = watched[0].register_forward_hook(nothing)
    assert not watch.unchanged
    second.remove()
    assert watch.unchanged
    handle.remove()
    assert not watch.unchanged


def test_hooks_put_in_the_place_of_as_many_and_filled_later_are_seen() -> None:
    watched: list[Any] = blocks()
    watch = ChangeWatch(watched)
    watched[0]._forward_hooks = OrderedDict()
    assert watch.unchanged
    watched[0].register_forward_hook(nothing)
    assert not watch.unchanged
