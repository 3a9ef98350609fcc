"""What no other server takes over at once: nobody left, memory given to others, no room at all."""

from __future__ import annotations

import copy
import gc
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.patience import wait_until, within
from support.scene import RESTART_SECONDS, TOLERANCE, AtToken, Scene, generate, scene

from swarm_notebook.client.session import writer
from swarm_notebook.errors import CacheFull, MissingBlocks
from swarm_notebook.local.folder import ServerFolder
from swarm_notebook.local.swarm import LocalServer
from swarm_notebook.server.engine.kv import budget as kv_budget

PATIENCE = 1.0
NOTICE_SECONDS = 2.0
CACHE_TOKENS = 256


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> Iterator[Scene]:
    """Two servers, neither of which can stand in for the other."""
    with scene(tiny_llama, [(0, 3), (3, 5)]) as made:
        yield made


@pytest.fixture(scope="module")
def small(tiny_llama: Path) -> Iterator[Scene]:
    """One server with little memory."""
    with scene(tiny_llama, 1, hosted=True, cache_tokens=CACHE_TOKENS) as made:
        yield made


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for memory waits little longer than servers protect a session that pauses.

    They do so for a bit longer than usual: on a busy machine, one that is at work may pause, too.
    """
    monkeypatch.setattr(kv_budget, "SHORT_IDLE_SECONDS", 3.0)
    monkeypatch.setattr(writer, "ALLOC_TIMEOUT", 4.0)


def test_blocks_without_a_server_and_their_servers_return(pair: Scene) -> None:
    """An error in time that says what is missing; then the same conversation goes on."""
    directory = pair.swarm.connection.directory
    patience, directory.patience = directory.patience, PATIENCE
    ids, more = pair.ids(1, 9), pair.ids(1, 5, seed=1)
    first = generate(pair.remote, ids)
    longer = torch.cat([first.sequences, more], dim=1)
    pair.local.servers[1].kill()
    for attempt in (
        lambda: generate(pair.remote, longer, past_key_values=first.past_key_values),
        lambda: pair.remote(ids),
    ):
        with (
            within(PATIENCE + NOTICE_SECONDS),
            pytest.raises(MissingBlocks, match=r"blocks 3:5 .*local-1 had them.*--blocks 3:5"),
        ):
            attempt()

    directory.patience = patience
    pair.local.servers[1].restart()
    ours = generate(pair.remote, longer, past_key_values=first.past_key_values)
    theirs = generate(pair.reference, ids)
    cache = theirs.past_key_values
    pair.same(ours, generate(pair.reference, longer, past_key_values=cache))


def test_a_generation_waits_for_a_server_that_comes_back(pair: Scene) -> None:
    ids = pair.ids(2, 9)
    directory = pair.swarm.connection.directory
    patience, directory.patience = directory.patience, RESTART_SECONDS
    restarts = threading.Thread(target=pair.local.servers[1].restart)

    def kill() -> None:
        pair.local.servers[1].kill()
        restarts.start()

    try:
        ours = generate(pair.remote, ids, num_beams=2, stopping_criteria=[AtToken({6: kill})])
    finally:
        directory.patience = patience
        restarts.join()
    pair.same(ours, generate(pair.reference, ids, num_beams=2))


@pytest.mark.usefixtures("short_waits")
def test_a_session_whose_memory_was_given_to_others_is_rebuilt(small: Scene) -> None:
    ids = small.ids(1, 20)
    first = generate(small.remote, ids)
    theirs = generate(small.reference, ids)
    many = small.ids(4, 50)
    with torch.no_grad():
        small.remote(many, use_cache=True)
    gc.collect()
    longer = torch.cat([first.sequences, small.ids(1, 3, seed=1)], dim=1)
    ours = generate(small.remote, longer, past_key_values=first.past_key_values)
    small.same(ours, generate(small.reference, longer, past_key_values=theirs.past_key_values))
    assert small.sessions[-2].failovers == 1


@pytest.mark.usefixtures("short_waits")
def test_idle_sessions_make_room_for_a_crowd_and_go_on_after_it(small: Scene) -> None:
    """Three are idle and one is at work, with all the memory; two more come, then two go on."""
    gc.collect()
    prompts = [small.ids(1, 20, seed) for seed in range(5)]
    notebooks = [copy.deepcopy(small.remote) for _ in range(6)]
    theirs = [generate(small.reference, ids) for ids in prompts]
    longer = [torch.cat([one.sequences, small.ids(1, 3)], dim=1) for one in theirs[:2]]
    firsts = [generate(notebooks[index], prompts[index]) for index in range(3)]
    idle = small.sessions[-3:]
    ids, done = small.ids(1, 20, seed=5), threading.Event()
    with torch.no_grad():
        busy = notebooks[5](ids, use_cache=True).past_key_values
        last = small.reference(ids).logits[:, -1:]

    @torch.no_grad()
    def work() -> int:
        """Take the last token back and ask for it again, until all others are through."""
        turns = 0
        while not done.is_set():
            busy.crop(-1)
            ours = notebooks[5](ids[:, -1:], past_key_values=busy, use_cache=True).logits
            torch.testing.assert_close(ours, last, atol=TOLERANCE, rtol=0)
            turns += 1
            done.wait(0.05)
        return turns

    def go_on(index: int) -> Any:
        cache = firsts[index].past_key_values
        return generate(notebooks[index], longer[index], past_key_values=cache)

    with ThreadPoolExecutor(4) as threads:
        working = threads.submit(work)
        try:
            came = list(
                threads.map(lambda index: generate(notebooks[index], prompts[index]), (3, 4))
            )
            went_on = list(threads.map(go_on, range(2)))
        finally:
            done.set()
        assert working.result() > 1
    for ours, one in zip(came, theirs[3:], strict=True):
        small.same(ours, one)
    for ours, longer_ids, one in zip(went_on, longer, theirs[:2], strict=True):
        small.same(ours, generate(small.reference, longer_ids, past_key_values=one.past_key_values))
    assert sum(session.failovers for session in idle) >= 2
    assert busy.session.failovers == 0


def test_a_notebook_whose_daemon_has_ended_goes_on(tiny_llama: Path) -> None:
    """In a conversation and with a new one, as the same peer."""
    with scene(tiny_llama, 1, hosted=True) as stage:
        node = stage.swarm.connection.directory.node
        ids, more = stage.ids(1, 9), stage.ids(1, 5, seed=1)
        first = generate(stage.remote, ids)
        peer, ended = node.peer_id, node.p2p._child.pid
        os.kill(ended, signal.SIGKILL)
        longer = torch.cat([first.sequences, more], dim=1)
        ours = generate(stage.remote, longer, past_key_values=first.past_key_values)
        cache = generate(stage.reference, ids).past_key_values
        stage.same(ours, generate(stage.reference, longer, past_key_values=cache))
        stage.same(generate(stage.remote, more), generate(stage.reference, more))
        assert node.peer_id == peer
        assert node.p2p._child.pid != ended


@torch.no_grad()
def test_a_batch_that_never_fits(small: Scene) -> None:
    numbers = rf"needs 480 cache tokens .* the {CACHE_TOKENS} that this server has.*--cache-tokens"
    with pytest.raises(CacheFull, match=numbers):
        small.remote(small.ids(8, 60), use_cache=True)
    with within(NOTICE_SECONDS):  # the server is not held to have failed
        small.remote(small.ids(1, 60), use_cache=True)


@torch.no_grad()
def test_a_batch_that_does_not_fit_now(small: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ALLOC_TIMEOUT", 0.2)
    gc.collect()
    held = small.remote(small.ids(1, 56), use_cache=True).past_key_values  # takes a page of 64
    numbers = rf"asked for 224 .*, 192 of {CACHE_TOKENS} are free"
    with pytest.raises(CacheFull, match=numbers):
        small.remote(small.ids(4, 56), use_cache=True)
    assert held.session.hops


def test_a_batch_that_fits_elsewhere(small: Scene, tiny_llama: Path) -> None:
    peers = small.local.initial_peers
    roomy = LocalServer(
        "roomy",
        (0, 5),
        str(tiny_llama),
        folder=ServerFolder(),
        swarm_addresses=lambda: peers,
        threads=1,
    )
    roomy.launch()
    try:
        roomy.join(peers)
        roomy.wait_ready(RESTART_SECONDS)
        small.swarm.status()
        # As if it were far away, so that it is not the first choice.
        small.swarm.connection.directory.rtt[str(roomy.peer_id)] = 3.0
        assert small.swarm.route().hops[0].name != "roomy"
        ids = small.ids(8, 60)
        ours = generate(small.remote, ids)
        small.same(ours, generate(small.reference, ids))
        assert small.sessions[-1].hops[0].segment.span.name == "roomy"
    finally:
        roomy.terminate()
        # Whoever comes next has to do with the small one.
        wait_until(lambda: "1 server online" in small.swarm.status().headline, "the leaving")
