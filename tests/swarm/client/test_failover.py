"""Servers that die, hang or leave in the middle of work: the output is the undisturbed one.

Everything is compared with the local model, which the undisturbed remote one equals (see
`test_families`). The servers are real and are killed with SIGKILL.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.patience import wait_until, within
from support.scene import (
    TOLERANCE,
    AtToken,
    Scene,
    generate,
    kill_daemon,
    kill_process,
    scene,
    stop_then_kill,
)

from swarm_notebook.local.swarm import LocalServer
from swarm_notebook.widgets import SwarmMap

# A new session takes one of the first two servers; the others can stand in together.
SPANS = [(0, 5), (0, 5), (0, 2), (2, 5)]
FAILOVER_SECONDS = 20.0  # a hung server is noticed in about five


@pytest.fixture(scope="module")
def redundant(tiny_llama: Path) -> Iterator[Scene]:
    with scene(tiny_llama, SPANS) as made:
        yield made


@pytest.fixture
def stage(redundant: Scene) -> Scene:
    return redundant.begin()


@pytest.mark.parametrize("kill", [stop_then_kill, kill_process, kill_daemon])
def test_killed_in_prefill(stage: Scene, kill: Callable[[LocalServer], None]) -> None:
    ids = stage.ids(2, 200)
    kill(stage.next_server())
    stage.same(generate(stage.remote, ids), generate(stage.reference, ids))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "beams", "prompt lookup"],
)
def test_killed_in_mid_decode(stage: Scene, options: dict[str, Any]) -> None:
    ids = stage.ids(1, 9).repeat(1, 2)
    theirs = generate(stage.reference, ids, **options)
    kill = AtToken({4: lambda: stage.in_use().kill()})
    stage.same(generate(stage.remote, ids, stopping_criteria=[kill], **options), theirs)
    assert stage.sessions[-1].failovers == 1


def test_the_map_sees_it_while_this_thread_is_busy(stage: Scene) -> None:
    shown, victims, blocks = SwarmMap(stage.swarm), [], []

    def kill() -> None:
        victims.append(stage.in_use())
        hop = stage.sessions[-1].hops[-1]
        blocks.append((hop.start, hop.end))
        victims[0].kill()

    def seen() -> bool:
        return bool(shown.failovers) and shown.failovers[-1][7] is not None

    try:
        generate(stage.remote, stage.ids(1, 9), stopping_criteria=[AtToken({4: kill})])
        wait_until(seen)
        _, peer, name, start, end, reason, taken, seconds = shown.failovers[-1]
        assert (peer, name, (start, end)) == (victims[0].peer_id, victims[0].name, blocks[0])
        assert "is gone" in reason or "ended the session" in reason
        assert name not in taken
        assert seconds > 0
        assert peer not in [part[0] for part in shown.route]
        assert {row[0]: row[4] for row in shown.servers}[peer] == "unreachable"
    finally:
        shown.close()


def test_killed_while_it_computes_for_a_padded_batch(stage: Scene) -> None:
    batch = stage.padded()
    kill = AtToken({5: lambda: stop_then_kill(stage.in_use())})
    ours = generate(stage.remote, batch, stopping_criteria=[kill])
    stage.same(ours, generate(stage.reference, batch))
    assert stage.sessions[-1].failovers == 1


def test_killed_again_and_again(stage: Scene) -> None:
    """First the whole model's server, then one of two that stood in, then who stood in for it."""
    first, second, *_ = stage.local.servers

    def kill_both() -> None:
        first.kill()
        second.kill()

    def back_and_kill() -> None:
        first.restart()
        stage.in_use().kill()

    ids = stage.ids(2, 8)
    acts = AtToken({3: kill_both, 6: back_and_kill, 9: stage.local.servers[2].kill})
    options: dict[str, Any] = {"num_beams": 2}
    ours = generate(stage.remote, ids, stopping_criteria=[acts], **options)
    stage.same(ours, generate(stage.reference, ids, **options))
    # Both lost parts, and every block of them once; another may have been asked for one meanwhile.
    hops = stage.sessions[-1].hops
    assert len(hops) >= 2
    assert [block for hop in hops for block in range(hop.start, hop.end)] == list(range(5))
    assert {hop.segment.peer for hop in hops} == {first.peer_id}


def test_killed_between_two_calls_of_a_conversation(stage: Scene) -> None:
    ids, more = stage.ids(1, 9), stage.ids(1, 5, seed=1)
    results = []
    for model in (stage.remote, stage.reference):
        first = generate(model, ids)
        if model is stage.remote:
            stage.in_use().kill()
        longer = torch.cat([first.sequences, more], dim=1)
        results.append(generate(model, longer, past_key_values=first.past_key_values))
    stage.same(*results)


def steer(model: Any) -> Any:
    """A hook that changes the state between two blocks, and with it all keys of later blocks."""

    def add(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.3 * torch.sin(output)

    return model.model.layers[2].register_forward_hook(add)


def test_killed_with_a_hook_that_writes(stage: Scene) -> None:
    """What the hook wrote is replayed; the session goes on through both kinds of chain."""
    ids = stage.ids(2, 9)
    hooks = [steer(stage.remote), steer(stage.reference)]
    kill = AtToken({4: lambda: stage.in_use().kill(), 8: hooks[0].remove})
    same_end = AtToken({8: hooks[1].remove})
    ours = generate(stage.remote, ids, stopping_criteria=[kill])
    theirs = generate(stage.reference, ids, stopping_criteria=[same_end])
    stage.same(ours, theirs)
    assert stage.sessions[-1].failovers == 1


def test_killed_inside_a_hook_that_writes(stage: Scene) -> None:
    """The step begins again with a block before the hook's: two requests to one server."""
    ids = stage.ids(2, 9)
    hooks = [steer(stage.remote), steer(stage.reference)]
    calls = itertools.count()

    def kill(_module: Any, _inputs: Any, _output: torch.Tensor) -> None:
        if next(calls) == 5:
            stage.in_use().kill()

    hooks.append(stage.remote.model.layers[2].register_forward_hook(kill))
    try:
        stage.same(generate(stage.remote, ids), generate(stage.reference, ids))
    finally:
        for hook in hooks:
            hook.remove()
    assert stage.sessions[-1].failovers == 1


@torch.no_grad()
def test_killed_in_a_forward_pass(stage: Scene) -> None:
    ids = stage.ids(3, 150)
    stop_then_kill(stage.next_server())
    ours = stage.remote(ids, output_hidden_states=True)
    theirs = stage.reference(ids, output_hidden_states=True)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=TOLERANCE, rtol=0)
    for mine, local in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, local, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rows", [1, 60], ids=["small request", "more than the buffers hold"])
def test_a_server_that_hangs(stage: Scene, rows: int) -> None:
    ids = stage.ids(rows, 250 if rows > 1 else 20)
    hung = stage.next_server()
    assert hung.pid is not None
    os.kill(hung.pid, signal.SIGSTOP)
    try:
        with torch.no_grad(), within(FAILOVER_SECONDS):
            ours = stage.remote(ids, use_cache=True).logits
        theirs = stage.reference(ids).logits
    finally:
        os.kill(hung.pid, signal.SIGCONT)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    assert stage.sessions[-1].failovers == 1


def test_a_server_that_leaves_in_good_order(stage: Scene) -> None:
    ids = stage.ids(2, 9)
    left: list[LocalServer] = []

    def leave() -> None:
        left.append(stage.in_use())
        left[0].request_stop()

    ours = generate(stage.remote, ids, stopping_criteria=[AtToken({5: leave})])
    stage.same(ours, generate(stage.reference, ids))
    left[0].terminate()
    assert "left the swarm" in left[0].log_path.read_text()
